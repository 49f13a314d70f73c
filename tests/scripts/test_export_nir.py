"""scripts/export_nir.py: the files give the trained networks' spikes, and it is noticed where they do not."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from models import SDID, VQSVAE, VQVAE, ResidualSDID, ResidualSVAE, UNetSDID
from models.integer import in_whole_numbers
from models.neurons import IF, LIF, PLIF, FewSpikes, FromRest
from pipeline.sampling.batches import float_type
from pixels import to_float
from scripts import export_nir

nir = pytest.importorskip("nir")
pytest.importorskip("nirtorch")

AUTOENCODER, RESIDUAL = ("encoder", "spike_generator", "decoder"), ("encoder", "codes", "decoder")


def export(capsys, *arguments):
    """Exit status, lines on stdout, lines on stderr."""
    with pytest.raises(SystemExit) as exit_:
        export_nir.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit_.value.code, out.splitlines(), err.splitlines()


def trained(model, seed=0):
    """As if trained: batch norm has statistics, scales and biases of its own; neurons fire."""
    torch.manual_seed(seed)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.1, 0.5)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.weight, 0.8, 1.5)
        nn.init.normal_(norm.bias, 1.0, 0.5)
    return model.double().eval()


def autoencoder(**options):
    return trained(
        VQSVAE(
            **{"channels": 1, "codebook_size": 8, "embedding_dim": 8, "spike_steps": 4, "hidden_channels": 4} | options
        )
    )


def conditioned(denoiser):
    """With conditions, where it has some, that make a difference."""
    if denoiser.prototypes:
        denoiser.prototypes.grids.random_(8)
    for condition in filter(None, (denoiser.prototypes, denoiser.labels)):
        condition.counts.fill_(1)
        nn.init.normal_(condition.embed.weight)
    return denoiser


def pixels(*shape):
    """Random images."""
    return to_float(torch.randint(256, shape, dtype=torch.uint8), torch.float64)


def improved(channels=1, downsampling=4, **shape):
    """Autoencoder and denoiser of the improved preset, for images of 16x16 pixels."""
    shape = {"spike_steps": 1, "neuron": partial(FewSpikes, 3)} | shape
    model = ResidualSVAE(channels, 8, hidden_channels=8, downsampling=downsampling, **shape)
    conditions = dict(prototypes=2, classes=3, grid=(32 // downsampling, 32 // downsampling))
    return trained(model), conditioned(
        trained(UNetSDID(8, denoiser_channels=48, denoiser_blocks=1, **conditions, **shape))
    )


def assert_alike(exports, path):
    """Every network gives the trained one's spikes, of which there are some, when it is read back from its file."""
    for each in exports:
        compared = export_nir.compare(each, export_nir.read_back(each, path))
        assert compared.spikes > 50 and compared.differing == 0 and compared.error < 1e-9, each.name


@torch.no_grad()
def test_every_network_of_a_run(run, capsys):
    status, lines, errors = export(capsys, run)
    assert (status, errors) == (0, [])
    assert [line.split(":")[0] for line in lines] == [f"{name}.nir" for name in (*AUTOENCODER, "denoiser")]
    assert all(line.endswith("spikes compared: identical") for line in lines)
    graphs = [nir.read(run / "nir" / line.split(":")[0]) for line in lines]
    neurons = [sum(isinstance(node, nir.LIF) for node in graph.nodes.values()) for graph in graphs]
    assert neurons == [3, 1, 2, 5]


@pytest.mark.parametrize("options", [{}, {"downsampling": 2}, {"channels": 3}], ids=str)
@torch.no_grad()
def test_decoder_on_the_grid_of_codes_draws_the_same_pixels(options, tmp_path):
    model = autoencoder(**options)
    images = torch.rand(8, model.channels, 12, 16, dtype=torch.float64)
    exports = list(export_nir.of_autoencoder(model, images))
    assert [each.name for each in exports] == list(AUTOENCODER)
    for each in exports:
        graph = export_nir.read_back(each, tmp_path / "network.nir")
        compared = export_nir.compare(each, graph)
        assert compared.spikes > 50 and compared.differing == 0 and compared.error < 1e-12
    pixels = each.outside(graph(each.inputs)[0])
    assert torch.allclose(pixels, model.decoder(each.inputs), atol=1e-12) and pixels.std() > 0.01


@torch.no_grad()
def test_denoiser_with_its_head(tmp_path):
    model = trained(SDID(codebook_size=8, spike_steps=4, denoiser_channels=4))
    exported = export_nir.of_denoiser(model, torch.randint(8, (3, 4, 5)))
    graph = export_nir.read_back(exported, tmp_path / "network.nir")
    compared = export_nir.compare(exported, graph)
    assert compared.spikes > 50 and compared.differing == 0 and compared.error < 1e-12
    graph.get_submodule("out").bias[0] += 1e-3  # no spike depends on it
    compared = export_nir.compare(exported, graph)
    assert compared.differing == 0 and compared.error == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "neuron", [partial(LIF, 3.0, 0.7), partial(LIF, v_reset=-0.2), IF, PLIF, partial(PLIF, 3.0, 0.8)], ids=str
)
@torch.no_grad()
def test_every_neuron_with_a_node(neuron, tmp_path):
    """Each layer of PLIF has a time constant of its own."""
    model, sdid = autoencoder(neuron=neuron), trained(SDID(8, 4, 4, neuron=neuron))
    residual = trained(ResidualSDID(8, 2, 32, denoiser_blocks=2, grid=(4, 4), neuron=neuron))
    layers = [each for network in (model, sdid, residual) for each in network.modules() if isinstance(each, FromRest)]
    for number, layer in enumerate(layers):
        if isinstance(layer, PLIF):
            layer.w.add_(0.05 * number)
    exports = [*export_nir.of_autoencoder(model, torch.rand(3, 1, 16, 16).double())]
    exports += [export_nir.of_denoiser(denoiser, torch.randint(8, (3, 4, 4))) for denoiser in (sdid, residual)]
    found = []
    for each in exports:
        compared = export_nir.compare(each, export_nir.read_back(each, tmp_path / "network.nir"))
        assert compared.spikes > 50 and compared.differing == 0 and compared.error < 1e-12, each.name
        nodes = nir.read(tmp_path / "network.nir").nodes.values()
        found += [node for node in nodes if isinstance(node, nir.IF | nir.LIF)]
    assert len(found) == len(layers) == 3 + 1 + 2 + 5 + 7
    assert {type(node) for node in found} == {nir.IF if neuron is IF else nir.LIF}
    for name in ("v_threshold", "v_reset"):
        assert {float(getattr(node, name).flat[0]) for node in found} == {getattr(layers[0], name)}
    if neuron is not IF:
        wanted = [float(1 / each.w.sigmoid()) if isinstance(each, PLIF) else each.tau for each in layers]
        taus = [float(node.tau.flat[0]) / 1e-4 for node in found]
        assert sorted(taus) == pytest.approx(sorted(wanted)) and len(set(taus)) in (1, 18)


class Mine(FromRest, export_nir.neuron.SimpleLIFNode):
    def __init__(self):
        super().__init__(2.0, True)


@pytest.mark.parametrize(("neuron", "said"), [(partial(LIF, v_reset=None), "--v_reset soft"), (Mine, "neuron Mine")])
def test_a_neuron_without_a_node_is_refused(neuron, said):
    with pytest.raises(export_nir.UserError, match=f"no node for .*{said}"):
        list(export_nir.of_autoencoder(autoencoder(neuron=neuron), torch.rand(3, 1, 16, 16).double()))


@pytest.mark.parametrize("preset", ["faithful", "improved"])
@torch.no_grad()
def test_snntorch_gives_every_spike(preset, tmp_path):
    """Another implementation of NIR reads each file and does what SpikingJelly does with it.

    Both compute in float64, with weights that float32 holds: snnTorch takes no others. It refuses SpikingJelly's IF
    nodes.
    """
    pytest.importorskip("snntorch", reason="needs snnTorch: pip install snntorch", exc_type=ImportError)
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    if preset == "faithful":
        model, denoiser = autoencoder(), SDID(codebook_size=8, spike_steps=4, denoiser_channels=4)
        exports = [*export_nir.of_autoencoder(model, images)]
    else:
        model, denoiser = improved(neuron=LIF, spike_steps=2)
        exports = [each for each in export_nir.of_residual(model, images) if each.name != "codes"]
    exports.append(export_nir.of_denoiser(trained(denoiser), model.encode(images)))
    for each in exports:
        each.graph.float().double()
        path = tmp_path / f"{each.name}.nir"
        graph = export_nir.read_back(each, path)
        (wanted, _), spikes = export_nir.observe(graph, partial(graph, each.inputs))
        outputs, others = run_by_snntorch(path, each.inputs)
        assert sum(map(torch.sum, spikes)) > 50, each.name
        for ours, theirs in zip(spikes, others, strict=True):
            assert torch.equal(ours, theirs), each.name
        assert wanted.std() > 0.01 and torch.allclose(outputs, wanted, rtol=0, atol=1e-9), each.name


def run_by_snntorch(path, inputs):
    """Outputs `[S,N,C,H,W]` and each layer's spikes `[S,N,C,H,W]` for the inputs of a file's graph."""
    from snntorch import Leaky
    from snntorch.import_nir import import_from_nir

    network, spikes = import_from_nir(nir.read(path)).double(), []
    neurons = [module for module in network.modules() if isinstance(module, Leaky)]

    def record(_, __, output):
        spikes.append(output.double())  # snnTorch's spikes are float32 whatever the network is
        return spikes[-1]

    for module in neurons:
        module.register_forward_hook(record)
    outputs = torch.stack([network(x)[0] for x in inputs])
    return outputs, [torch.stack(spikes[i :: len(neurons)]) for i in range(len(neurons))]


def test_another_weight_is_noticed(run, capsys, monkeypatch):
    read_back = export_nir.read_back

    def with_another_weight(exported, path):
        graph = read_back(exported, path)
        if path.name == "encoder.nir":
            graph.get_submodule("blocks_0_enter_digits_0").weight *= 1.05
        return graph

    monkeypatch.setattr(export_nir, "read_back", with_another_weight)
    status, (encoder, *others), _ = export(capsys, run)
    assert status == 1 and " DIFFER" in encoder
    assert all(line.endswith("identical") for line in others)


def test_raster_of_what_differs(run, capsys):
    """Rows are neurons that fire; a spike that only one of the two has is shown for this one alone."""
    trained = [torch.zeros(3, 2, 1, 1, 4), torch.zeros(3, 2, 40, 1, 1)]
    trained[0][1, 0, 0, 0, 2] = trained[1][:, 0] = trained[0][0, 1] = 1  # the last is of the second image
    graph = [layer.clone() for layer in trained]
    graph[0][2, 0, 0, 0, 2] = 1
    (steps, rows), (steps_graph, rows_graph) = export_nir.shown(export_nir.Comparison(trained, graph, 0.0))
    assert len(steps) == 1 + 3 * export_nir.NEURONS and set(rows.tolist()) == {0, *range(14, 26)}
    spikes = {*zip(steps.tolist(), rows.tolist(), strict=True)}
    assert {*zip(steps_graph.tolist(), rows_graph.tolist(), strict=True)} == spikes | {(3, 0)} and (2, 0) in spikes
    assert export(capsys, run, "--raster", run / "raster.png")[0] == 0 and (run / "raster.png").stat().st_size > 1000
    status, _, (error,) = export(capsys, run, "--raster", run / "raster.foo")
    assert status == 2 and "raster.foo cannot be written" in error


def change_options(run, **options):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | options))


@pytest.mark.parametrize(
    "options",
    [
        {"grid": (4, 4)},
        {"grid": (3, 3)},
        {"grid": (4, 4), "prototypes": 2},
        {"grid": (4, 4), "classes": 3},
        {"grid": (3, 3), "prototypes": 2, "classes": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_residual_denoiser(options, tmp_path):
    model = conditioned(trained(ResidualSDID(8, 2, denoiser_channels=32, denoiser_blocks=2, **options)))
    assert model.patch == (1 if options["grid"] == (3, 3) else 2)
    exported = export_nir.of_denoiser(model, torch.randint(8, (5, *options["grid"])))
    graph = export_nir.read_back(exported, tmp_path / "network.nir")
    compared = export_nir.compare(exported, graph)
    assert compared.spikes > 50 and compared.differing == 0 and compared.error < 1e-12
    for condition in filter(None, (model.prototypes, model.labels)):
        condition.embed.weight.mul_(2)
        assert export_nir.compare(exported, graph).differing > 0  # what is told has influence
        condition.embed.weight.div_(2)


@pytest.mark.parametrize(
    ("downsampling", "neuron", "steps", "whole"),
    [
        (2, partial(FewSpikes, 3), 1, False),
        (4, partial(FewSpikes, 4), 1, True),
        (4, LIF, 2, False),
        (2, IF, 3, True),
    ],
    ids=str,
)
@torch.no_grad()
def test_residual_autoencoder_and_unet(downsampling, neuron, steps, whole, tmp_path):
    networks = improved(2, downsampling, neuron=neuron, spike_steps=steps)
    model, denoiser = (in_whole_numbers(each.float()) for each in networks) if whole else networks
    images, codes = pixels(3, 2, 16, 16).to(float_type(model)), torch.randint(8, (3, *denoiser.position.shape[1:]))
    codes = codes.repeat_interleave(denoiser.patch, 1).repeat_interleave(denoiser.patch, 2)
    exports = [*export_nir.of_residual(model, images), export_nir.of_denoiser(denoiser, codes)]
    assert [each.name for each in exports] == [*RESIDUAL, "denoiser"]
    assert_alike(exports, tmp_path / "network.nir")


@pytest.mark.parametrize("whole", [False, True], ids=["", "in whole numbers"])
@torch.no_grad()
def test_few_spikes_neurons_in_the_papers_networks(whole, tmp_path):
    shape = dict(spike_steps=1, neuron=partial(FewSpikes, 4))
    model, sdid = autoencoder(**shape), trained(SDID(8, denoiser_channels=4, **shape))
    residual = conditioned(trained(ResidualSDID(8, denoiser_channels=32, denoiser_blocks=1, grid=(4, 4), **shape)))
    networks = (model, sdid, residual)
    model, *denoisers = (in_whole_numbers(each.float()) for each in networks) if whole else networks
    exports = [*export_nir.of_autoencoder(model, pixels(3, 1, 16, 16).to(float_type(model)))]
    exports += [export_nir.of_denoiser(each, torch.randint(8, (3, 4, 4))) for each in denoisers]
    assert_alike(exports, tmp_path / "network.nir")


@pytest.mark.parametrize(
    ("neuron", "said"),
    [(LIF, "LIF neurons in whole numbers"), (partial(FewSpikes, 5), "rounds, as .* 4 --digits")],
    ids=str,
)
def test_whole_numbers_that_nir_cannot_say_are_refused(neuron, said):
    model = in_whole_numbers(trained(ResidualSDID(8, 1, 32, denoiser_blocks=1, grid=(4, 4), neuron=neuron)).float())
    with pytest.raises(export_nir.UserError, match=said):
        export_nir.of_denoiser(model, torch.randint(8, (3, 4, 4)))


def test_run_with_a_residual_denoiser(run, capsys):
    change_options(run, denoiser="residual")
    torch.save(
        ResidualSDID(8, 4, denoiser_channels=16, denoiser_blocks=1, grid=(4, 4)).state_dict(),
        run / "diff_result" / "diff_model.pth",
    )
    status, lines, errors = export(capsys, run, "--output", run / "elsewhere")
    assert (status, errors) == (0, []) and lines[-1].startswith("denoiser.nir: planes of tokens, prototype")
    assert all(line.endswith("spikes compared: identical") for line in lines)
    assert {path.stem for path in (run / "elsewhere").iterdir()} == {*AUTOENCODER, "denoiser"}


def test_autoencoder_without_spikes_is_not_exported(run, capsys):
    change_options(run, model="vq-vae")
    torch.save(VQVAE(1, 8, 8, 8).state_dict(), run / "model.pth")
    status, (line, denoiser), _ = export(capsys, run)
    assert status == 0 and line.startswith("autoencoder: not exported, this is vq-vae")
    assert denoiser.endswith("identical")


@pytest.mark.parametrize("spike_generator", ["repeat", "poisson"])
@torch.no_grad()
def test_spike_generator_without_neurons_is_not_exported(spike_generator, tmp_path):
    exports = list(
        export_nir.of_autoencoder(autoencoder(spike_generator=spike_generator), torch.rand(2, 1, 8, 8).double())
    )
    assert exports[1] == f"spike_generator: not exported, {spike_generator!r} has no neurons"
    assert_alike(exports[2:], tmp_path / "network.nir")


def test_a_run_of_one_stage(run, capsys):
    (run / "diff_result" / "diff_model.pth").unlink()
    status, lines, _ = export(capsys, run)
    assert status == 0 and lines[-1] == "denoiser: not exported, the run has none"


def test_missing_packages_are_named(run, capsys, monkeypatch):
    monkeypatch.setattr(export_nir, "nir_exchange", None)
    assert export(capsys, run) == (2, [], ["error: two packages are missing: pip install nir nirtorch"])


def test_no_run_is_one_line(tmp_path, capsys):
    status, lines, (error,) = export(capsys, tmp_path / "nothing")
    assert status == 2 and not lines and error.startswith("error: ") and "does not exist" in error
