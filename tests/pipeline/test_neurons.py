"""Neurons that are chosen: in every network, through a run and whatever follows it, and one of one's own."""

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import IMPROVED, ROOT, SMALL, as_modules, read_metrics, run_in, without
from test_start import block

import parts
from models import build_denoiser, build_model, choose_neuron, model_options, neuron_options
from models.neurons import IF, LIF, PLIF, FewSpikes, FromRest
from models.spiking import Firing
from parts import AUTOENCODERS, DENOISERS, NEURONS
from pipeline.checkpoints import load_weights
from scripts.pack import main as pack
from spiking_diffusion import SpikingDiffusion

SHORT = ("--epochs", 1, "--diffusion_epochs", 1)


def of_the_documents():
    """The neuron of one's own that docs/extending.md shows."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = {"__name__": __name__}
    exec(re.search(r"```python\n(# quadratic.py.*?)```", page, re.DOTALL)[1], found)
    return found["Quadratic"]


Quadratic = of_the_documents()


def neurons_of(network):
    """Those that are chosen: what the residual autoencoder sends as codes are few-spikes neurons in any case."""
    layers = network.named_modules()
    return [layer for name, layer in layers if isinstance(layer, FromRest) and "fire_codes" not in name]


def spiking_networks(**options):
    """All of them, small, by name."""
    small = {name: dict(spike_steps=3, hidden_channels=4) for name in AUTOENCODERS if "neuron" in model_options(name)}
    for name in small.keys() - {"residual-svae"}:
        small[name]["embedding_dim"] = 4
    of_denoiser = dict(codebook_size=8, spike_steps=3, denoiser_channels=48)
    networks = {name: (build_model, sizes) for name, sizes in small.items()}
    networks |= {name: (build_denoiser, of_denoiser) for name in DENOISERS}
    assert set(networks) == {"snn-vq-vae", "residual-svae", "snn-vae", "sdid", "residual", "unet"}
    return {name: build(name, **sizes, **options) for name, (build, sizes) in networks.items()}


@pytest.mark.parametrize(("name", "kind"), [("lif", LIF), ("if", IF), ("plif", PLIF), ("fs", FewSpikes)])
def test_every_network_is_made_of_the_neurons_that_are_chosen(name, kind):
    chosen = choose_neuron(name, tau=3.0, v_threshold=0.7, v_reset=-0.1, digits=3)
    threshold = 1.0 if name == "fs" else 0.7
    for network, made in spiking_networks(neuron=chosen).items():
        layers = neurons_of(made)
        assert len(layers) >= 5 and {type(layer) for layer in layers} == {kind}, network
        if name == "fs":
            assert {layer.digits for layer in layers} == {3}
        else:
            assert {(layer.v_threshold, layer.v_reset) for layer in layers} == {(0.7, -0.1)}
        if name == "lif":
            assert {layer.tau for layer in layers} == {3.0}
        learned = [value for key, value in made.state_dict().items() if key.endswith(".w")]
        assert len(learned) == (len(layers) if name == "plif" else 0)
        assert all(float(value.sigmoid()) == pytest.approx(1 / 3) for value in learned)
        firing = [layer.norm for layer in made.modules() if isinstance(layer, Firing) and layer.lif in layers]
        assert bool(firing) == network.startswith(("residual", "unet"))
        assert all((norm.bias == threshold).all() for norm in firing)
    options = {"if": ("v_threshold", "v_reset"), "fs": ("digits",)}
    assert neuron_options(name) == options.get(name, ("tau", "v_threshold", "v_reset"))


def test_the_default_is_the_papers_neuron_and_has_no_weights():
    for name, network in spiking_networks().items():
        assert not any("lif" in key or "neuron" in key for key in network.state_dict()), name
        assert {type(layer) for layer in neurons_of(network)} == {LIF}
        assert {(layer.tau, layer.v_threshold, layer.v_reset) for layer in neurons_of(network)} == {(2.0, 1.0, 0.0)}


@torch.no_grad()
@pytest.mark.parametrize("digits", [1, 4])
def test_a_few_spikes_neuron_fires_as_its_thresholds_say(digits):
    """The potential falls by the weight of each digit that it reaches (arXiv 2002.00860); a layer adds what arrives."""
    layer, weights = choose_neuron("fs", digits=digits)(), [2.0 ** (1 - i) for i in range(digits)]
    currents = torch.cat([torch.linspace(-1, 6, 999), torch.tensor([0.125, 1 / 8 - 1e-3, 3.875, 1.0])]).view(1, 17, -1)
    potential, fired = currents.clamp_max(4 - weights[-1]) + weights[-1] / 2, []
    for weight in weights:
        fired.append((potential >= weight).float())
        potential = potential - weight * fired[-1]
    numbers = layer(currents)
    assert torch.equal(layer.binary_spikes(numbers), torch.stack(fired))
    assert torch.equal(numbers, sum(weight * spikes for weight, spikes in zip(weights, fired, strict=True)))
    assert len(numbers.unique()) == 2**digits and torch.equal(layer(numbers), numbers)


def test_the_gradient_of_a_few_spikes_neuron_is_that_of_clipping():
    currents = torch.tensor([[-1.0, 0.3, 3.7, 4.5]], requires_grad=True)
    choose_neuron("fs")()(currents).sum().backward()
    assert currents.grad.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("name", [*NEURONS, "own"])
@torch.no_grad()
def test_layers_called_as_modules_agree_and_no_state_survives(name):
    chosen = Quadratic if name == "own" else choose_neuron(name, tau=1.7)
    generator = torch.Generator().manual_seed(0)
    images, tokens = torch.rand(5, 1, 28, 28, generator=generator).double(), torch.randint(9, (5, 14, 14))
    t = torch.full((5,), 7)
    torch.manual_seed(0)
    for network, made in spiking_networks(neuron=chosen).items():
        made.double().eval()
        torch.manual_seed(1)
        for norm in (layer for layer in made.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(norm.bias, 2, 2)
        found = []
        for context in (nullcontext(), as_modules(made), nullcontext()):
            with context:
                if network in DENOISERS:
                    found.append(made(tokens, t))
                    at = made.logits_at(tokens, t, tokens == 8)
                    assert torch.allclose(at, found[-1].movedim(1, -1)[tokens == 8])
                else:
                    found.append(made(images, generator=torch.Generator().manual_seed(0)).images)
        assert torch.allclose(found[0], found[1], atol=1e-9) and torch.equal(found[0], found[2]), network
        assert found[0].std() > 1e-3, network
        assert not any(isinstance(layer.v, torch.Tensor) for layer in neurons_of(made))


def trained(cli, grey, place, *options):
    """The folder of a small run, and what it printed."""
    outcome = cli(*grey, *SMALL, *SHORT, *options, "--metrics", "mse,energy", "--result_path", place)
    assert outcome.status == 0, outcome.err
    return run_in(place), outcome


@pytest.fixture(scope="module")
def plif(cli, grey, tmp_path_factory):
    return trained(cli, grey, tmp_path_factory.mktemp("plif"), "--neuron", "plif", "--tau", 3, "--v_threshold", 0.8)


def test_a_run_records_its_neurons_and_learns_their_time_constants(plif):
    run, outcome = plif
    assert block(outcome.out)["neuron"] == "plif, tau 3, v_threshold 0.8, v_reset 0 (compiled kernels)"
    config = json.loads((run / "config.json").read_text())
    assert [config[key] for key in ("neuron", "tau", "v_threshold", "v_reset")] == ["plif", 3.0, 0.8, 0.0]
    wanted = {"neuron": "plif", "tau": 3.0, "v_threshold": 0.8}
    assert [wanted.items() <= entry["options"].items() for entry in config["lineage"]] == [True, True]
    for name, layers in (("model.pth", 6), ("diff_result/diff_model.pth", 5)):
        learned = [float(value) for key, value in load_weights(run / name).items() if key.endswith(".w")]
        assert len(learned) == len(set(learned)) == layers


def test_what_follows_a_run_has_its_neurons(plif, cli, grey, tmp_path):
    run = shutil.copytree(plif[0], tmp_path / "moved")
    drawn = cli("--checkpoint", run, "--stage", "sample", "--num_samples", 2)
    assert drawn.status == 0 and block(drawn.out)["neuron"].startswith("plif, tau 3")
    pack([str(run), str(tmp_path / "packed")])
    for folder in (run, tmp_path / "packed"):
        model = SpikingDiffusion.load(folder).model
        for layer in neurons_of(model.autoencoder) + neurons_of(model.denoiser):
            assert type(layer) is PLIF and layer.v_threshold == 0.8
    started = cli(
        *grey, "--start_from", run, "--stage", "sdid", "--max_minutes", 1e-9, "--result_path", tmp_path / "on"
    )
    assert started.status == 0 and block(started.out)["neuron"].startswith("plif, tau 3, v_threshold 0.8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--neuron", "lif"), "omit --neuron (plif in the run)"),
        (("--tau", "5"), "omit --tau (3 in the run)"),
        (("--v_reset", "soft"), "omit --v_reset (0 in the run)"),
    ],
    ids=str,
)
def test_other_neurons_than_those_of_a_run_are_refused(options, said, plif, cli, grey, tmp_path):
    run = shutil.copytree(plif[0], tmp_path / "run")
    evaluated = cli("--checkpoint", run, *options)
    assert evaluated.status == 2 and said in evaluated.err
    begun = cli(*grey, "--start_from", run, "--stage", "sdid", *options, "--result_path", tmp_path / "new")
    assert begun.status == 2 and said in begun.err and begun.err.count("\n") == 1


def test_a_run_from_before_there_was_a_choice_has_the_papers_neurons(run, cli):
    config = json.loads((run / "config.json").read_text())
    left = {key: config[key] for key in config if key not in ("neuron", "tau", "v_threshold", "v_reset")}
    (run / "config.json").write_text(json.dumps(left))
    outcome = cli("--checkpoint", run, "--stage", "sample", "--num_samples", 2)
    assert outcome.status == 0 and block(outcome.out)["neuron"].startswith("lif, tau 2, v_threshold 1, v_reset 0 ")
    assert "omit --neuron (lif in the run)" in cli("--checkpoint", run, "--neuron", "if").err


def test_weights_of_other_neurons_do_not_pass_for_these(plif, cli, tmp_path):
    run = shutil.copytree(plif[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"neuron": "lif"}))
    assert "does not hold the weights" in cli("--checkpoint", run, "--stage", "sample").err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--neuron", "if", "--tau", "3"), "if has no --tau: leave it out"),
        (("--neuron", "izhikevich"), "--neuron"),
        (("--neuron", "lif", "--digits", "2"), "lif has no --digits: leave it out"),
        (("--neuron", "fs", "--v_reset", "soft"), "fs has no --v_reset: leave it out"),
        (("--neuron", "fs"), "--neuron fs needs --spike_steps 1: its time steps"),
        (("--neuron", "fs", "--spike_steps", "1", "--denoiser_spike_steps", "2"), "needs --denoiser_spike_steps 1"),
        (("--tau", "1"), "'1' is not from 1.0001 to"),
        (("--v_threshold", "0"), "greater than 0"),
        (("--v_threshold", "0.5", "--v_reset", "0.5"), "--v_reset 0.5 is not less than --v_threshold 0.5"),
    ],
    ids=str,
)
def test_what_a_neuron_does_not_have_is_refused(options, said, cli, grey, tmp_path):
    outcome = cli(*grey, *options, "--result_path", tmp_path)
    assert outcome.status == 2 and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--neuron", "if", "--v_reset", "soft"),
        ("--neuron", "if", "--readout", "rate", "--spike_generator", "repeat"),
        ("--v_reset", "-0.5", "--spike_generator", "poisson"),
        ("--neuron", "plif", "--model", "snn-vae"),
        (*IMPROVED, "--neuron", "if"),
        (*IMPROVED, "--neuron", "plif"),
        ("--neuron", "fs", "--digits", "3", "--spike_steps", "1"),
        ("--denoiser", "residual", "--denoiser_channels", "16", "--neuron", "plif"),
    ],
    ids=lambda options: " ".join(map(str, options[-4:])),
)
def test_other_networks_train_with_other_neurons(options, cli, grey, tmp_path):
    sizes, epochs = () if "improved" in options else SMALL, SHORT
    if "snn-vae" in options:
        sizes, epochs = without(SMALL, "--codebook_size", "--denoiser_channels"), SHORT[:2]
    outcome = cli(*grey, *sizes, *options, *epochs, "--metrics", "mse,energy", "--result_path", tmp_path)
    assert outcome.status == 0, outcome.err
    neuron, fused = block(outcome.out)["neuron"], "--v_reset" not in options
    assert neuron.endswith("(compiled kernels)" if fused else "(SpikingJelly, not fused)")
    assert neuron.split(",")[0] == (options[options.index("--neuron") + 1] if "--neuron" in options else "lif")


def test_a_neuron_of_ones_own_is_a_line(cli, grey, tmp_path, monkeypatch):
    monkeypatch.setitem(parts.NEURONS, "own", f"{__name__}:Quadratic")
    run, outcome = trained(cli, grey, tmp_path, "--neuron", "own")
    assert block(outcome.out)["neuron"] == "own, tau 2, v_threshold 1 (SpikingJelly, not fused)"
    assert {type(layer) for layer in neurons_of(SpikingDiffusion.load(run).model.denoiser)} == {Quadratic}
    assert 0 < read_metrics(run)["firing_rate"]["value"] < 1
