"""Networks in whole numbers: nothing rounds, so the bits are the same whatever computes them."""

import hashlib
from functools import partial

import pytest
import torch
from helpers import IMPROVED, read_metrics, run_in, without
from torch import nn

from diffusion.absorbing import AbsorbingDiffusion
from models import SDID, VQSVAE, VQVAE, ResidualSDID, ResidualSVAE, UNetSDID, VQAutoencoder, integer
from models import integer_layers as layers
from models import integer_neurons as neurons
from models.kernels import compiled
from models.neurons import IF, LIF, PLIF, FewSpikes
from models.spiking import Firing
from parts import FEW_SPIKES_RANGE
from pipeline.checkpoints import load_checkpoint, load_weights
from pixels import to_float
from scripts import pack

GRID = (8, 8)
NETWORKS = {
    "residual-svae": partial(ResidualSVAE, hidden_channels=8, downsampling=2, neuron=FewSpikes),
    "two levels": partial(ResidualSVAE, channels=3, hidden_channels=8, downsampling=4, neuron=FewSpikes),
    "residual": partial(ResidualSDID, 8, 1, 16, 1, 3, 2, GRID, neuron=FewSpikes),
    "unet": partial(UNetSDID, 8, 1, 48, 1, 3, 2, GRID, neuron=FewSpikes),
    "vq-svae": partial(VQSVAE, 1, 8, 4, 6, 8, 2),
    "vq-svae, fs": partial(VQSVAE, 3, 8, 4, 1, 8, 2, neuron=FewSpikes),
    "sdid": partial(SDID, 8, 6, 4),
    "residual-svae, lif": partial(ResidualSVAE, spike_steps=3, hidden_channels=8, downsampling=2),
    "residual, if": partial(ResidualSDID, 8, 3, 16, 1, 3, 2, GRID, neuron=IF),
}
"""Five of few-spikes neurons, and others; the paper's have six spike steps, not a power of 2."""


def without_rounding(network):
    """Give a network weights that are the same on every processor: small whole numbers, some of them divided by 7."""
    random = torch.Generator().manual_seed(5)
    sent = network.vq_layer.embeddings.weight if isinstance(network, ResidualSVAE) else None
    for name, value in network.state_dict(keep_vars=True).items():
        if name == "prototypes.grids":
            value.copy_(torch.randint(8, value.shape, generator=random))
        elif value.is_floating_point() and value is not sent:
            small = torch.randint(-60, 61, value.shape, generator=random, dtype=torch.float32)
            value.data = small / 7 / 30
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data, norm.running_var = (7 * each.abs() + 0.5 for each in (norm.weight.data, norm.running_var))
            norm.bias.data += 1
    if isinstance(network, VQSVAE):
        network.vq_layer.embeddings.weight.data = 8 * network.vq_layer.embeddings.weight.data.abs()  # as what is read
    return network.eval()


@pytest.fixture(params=NETWORKS)
def trained(request):
    return without_rounding(NETWORKS[request.param]())


def inputs_of(network):
    random = torch.Generator().manual_seed(6)
    if isinstance(network, VQAutoencoder):
        return (torch.randint(256, (4, network.channels, 16, 16), generator=random).float() / 255,)
    tokens, t = torch.randint(9, (4, *GRID), generator=random), torch.tensor([64, 40, 7, 1])
    return (tokens, t, *((torch.tensor([[0, 1], [2, -1], [-1, 0], [-1, -1]]),) if network.conditions else ()))


@torch.no_grad()
def outputs_of(network):
    """Logits, or codes and pixels."""
    inputs = inputs_of(network)
    if isinstance(network, VQAutoencoder):
        codes = network.encode(*inputs)
        return codes, network.decode(codes)
    return (network(*inputs),)


def digest(*tensors):
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def test_a_row_is_int8_times_the_best_power_of_two():
    weight = torch.tensor([[127.0, 1, 1], [128.0, 1, 1], [0.5, 0.26, 0.1], [0.0, 0, 0], [1e-9, 0, 0]])
    scales = layers.row_scales(weight)
    assert (torch.frexp(scales).mantissa == 0.5).all(), "powers of two"
    assert scales[:3].tolist() == [1, 1, 2**-7], "128 is clipped to 127, which costs less than halving all others"
    rounded = layers.whole(weight)
    assert torch.equal(layers.whole(rounded), rounded) and torch.equal(layers.row_scales(rounded), scales)
    assert (rounded[2] - weight[2]).abs().max() <= 2**-8 and not rounded[3].any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("digits", [2, 4])
def test_thresholds_are_those_of_batch_norm_and_neuron(sign, digits):
    """Currents that are no nearer than two units to a threshold are answered as by the network itself."""
    firing = Firing(3, 1, 1.0, partial(FewSpikes, digits)).eval()
    firing.norm.weight.data = sign * torch.tensor([0.3, 1.0, 4.0])
    firing.norm.running_mean.copy_(torch.tensor([1.5, -0.2, 0.0]))
    whole, last = neurons.IntegerFewSpikes(firing.norm, firing.lif), FEW_SPIKES_RANGE / 2**digits
    x = layers.in_units(torch.linspace(-6, 6, 30_001)).view(-1, 1, 1, 1).expand(-1, 3, -1, -1)
    counts, expected = whole(x[None]), firing(x)
    either_side = [firing(x + 4 * side * layers.UNIT) for side in (-1, 1)]
    sure = (either_side[0] == expected) & (either_side[1] == expected)
    assert counts.dtype == torch.uint8 and sure.double().mean() > 0.98
    assert torch.equal(counts[sure] * last, expected[sure])


def test_both_ways_of_counting_agree(monkeypatch):
    """Also at the thresholds themselves, for float32 and float64."""
    steps, offset = torch.tensor([1.0, -3.0, 7.0, 2**20]) * layers.UNIT, torch.tensor([0.0, 2.0, -5.0, 1.0])
    x = torch.arange(-4000, 4000).view(-1, 1, 1, 1) * layers.UNIT * torch.tensor([1.0, 1, 1, 2**9]).view(1, 4, 1, 1)
    for dtype in (torch.float32, torch.float64):
        fast = neurons._count_thresholds(x.to(dtype), offset, steps, 15)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has", lambda kernel: False)
            slow = neurons._count_thresholds(x.to(dtype), offset, steps, 15)
        exact = ((x.double() + offset.view(1, 4, 1, 1)) / steps.double().view(1, 4, 1, 1)).floor().clamp(0, 15)
        assert torch.equal(fast[0], slow[0]) and torch.equal(fast[0], exact.to(torch.uint8)) and not fast[1] | slow[1]
    x[0] = layers.LARGEST_CURRENT
    assert neurons._count_thresholds(x, offset, steps, 15)[1], "too large a current is no silent mistake"


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("neuron", [LIF, IF, partial(LIF, 4.0, 0.5)], ids=["lif", "if", "tau_4"])
def test_potentials_are_those_of_batch_norm_and_neuron(neuron, constant, monkeypatch):
    """Almost all spikes are those of the network itself, and both ways of computing give the same."""
    firing = Firing(4, 6, 1.0, neuron).eval()
    firing.norm.weight.data = torch.tensor([0.3, -1.0, 4.0, 0.0])
    firing.norm.running_mean.copy_(torch.tensor([1.5, -0.2, 0.0, 1.0]))
    firing.norm.bias.data[3] = 0.7  # with a gain of 0: not just at the threshold
    whole = neurons.IntegerLIF(firing.norm, firing.lif)
    x = layers.in_units(3 * torch.randn(6, 20, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    x = x[0] if constant else x
    for currents in (x, x.double()):
        spikes = whole(currents, 6)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has", lambda kernel: False)
            assert torch.equal(whole(currents, 6), spikes)
        assert spikes.dtype == torch.uint8 and (spikes != firing(x)).double().mean() < 1e-3
    assert 0.1 < spikes.double().mean() < 0.9
    x[0] = neurons.LARGEST[torch.float32]
    with pytest.raises(OverflowError, match="too large"):
        whole(x, 6)


def test_int8_and_float64_give_the_same_bits(trained, monkeypatch):
    network = integer.in_whole_numbers(trained)
    fast = outputs_of(network)
    monkeypatch.setattr(layers, "_has_int8", lambda x: False)
    monkeypatch.setattr(compiled, "has", lambda kernel: False)
    assert all(torch.equal(one, other) for one, other in zip(fast, outputs_of(network), strict=True))


def test_nothing_rounds(trained, monkeypatch):
    """With all channels of every layer in another order of summation, the bits are the same."""
    network = integer.in_whole_numbers(trained)
    before = outputs_of(network)
    monkeypatch.setattr(layers, "_has_int8", lambda x: False)
    convolve = nn.functional.conv2d

    def backwards(x, weight, bias, stride, padding, dilation, groups):
        x, weight = x.float(), weight.float()  # in float32, whose sums would tell their order if they were rounded
        if groups == 1:
            return convolve(x.flip(1), weight.flip(1), bias, stride, padding, dilation).double()
        return convolve(x, weight, bias, stride, padding, dilation, groups).double()

    convolve_transposed = nn.functional.conv_transpose2d

    def transposed_backwards(x, weight, *modes):
        return convolve_transposed(x.float().flip(1), weight.float().flip(0), *modes).double()

    monkeypatch.setattr(layers.F, "conv2d", backwards)
    monkeypatch.setattr(layers.F, "conv_transpose2d", transposed_backwards)
    assert all(torch.equal(one, other) for one, other in zip(before, outputs_of(network), strict=True))


@pytest.mark.parametrize("most", [127, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_events_of_whole_weights(stride, most, monkeypatch):
    """More channels than a tile has, and some outputs of more spikes than int16 can add up."""
    random = torch.Generator().manual_seed(1)
    conv = nn.Conv2d(96, 70, 3, stride=stride, padding=1, bias=False)
    conv.weight.data = torch.randint(-most, most + 1, conv.weight.shape, generator=random).float()
    conv.weight.data[0], conv.weight.data[1] = most, -most
    spikes = (torch.rand(8, 96, 6, 6, generator=random) < 0.03).to(torch.uint8)
    spikes[0, :, :4, :4] = 1
    layer, found = layers.IntegerConv2d(conv, 1.0), []
    real = layers.event_conv.convolve_whole
    monkeypatch.setattr(layers.event_conv, "convolve_whole", lambda *given: found.append(real(*given)) or found[-1])
    expected = nn.functional.conv2d(spikes.double(), conv.weight.double(), None, stride, 1)
    assert torch.equal(layer(spikes), expected.float()) and expected.abs().max() == 9 * 96 * most
    assert found[0] is not None or not compiled.available()


@pytest.mark.parametrize(
    ("steps", "channels", "neuron"),
    [(4, 4, LIF), (4, 64, LIF), (1, 4, FewSpikes), (128, 4, LIF), (256, 4, LIF)],
    ids=["dense", "events", "fs", "many sums", "beyond int8"],
)
@pytest.mark.parametrize("int8", [True, False])
@torch.no_grad()
def test_logits_at_some_positions_are_those_of_all(int8, steps, channels, neuron, monkeypatch):
    """SDID computes only what they depend on, where the mean over the spike steps is exact."""
    network = integer.in_whole_numbers(without_rounding(SDID(8, steps, channels, neuron)))
    if not int8:
        monkeypatch.setattr(layers, "_has_int8", lambda x: False)
    (tokens, t), where = inputs_of(network), torch.zeros(4, *GRID, dtype=torch.bool)
    where[0, 0, 0] = where[1, 3, 5] = where[3] = True
    expected = network(tokens, t).permute(0, 2, 3, 1)[where]
    assert torch.equal(network.logits_at(tokens, t, where), expected) and expected.std() > 0.1
    monkeypatch.setattr(SDID, "forward", None)
    assert torch.equal(network.logits_at(tokens, t, where), expected), "without computing all"


DIGESTS = {
    "residual-svae": "d6137b89e5c67d56",
    "two levels": "7cab64b57c2f59a7",
    "residual": "1de3040421f93396",
    "unet": "ab7d64c382dd52a3",
    "vq-svae": "26c2b9ec57055d7d",
    "vq-svae, fs": "f0ff41c37c48bf49",
    "sdid": "be7857533fb187a0",
    "residual-svae, lif": "af3c0baa81c485d6",
    "residual, if": "3ea6b4434a266b43",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_on_every_processor(name):
    """Of pixels and codes, and of codes that are drawn."""
    network = integer.in_whole_numbers(without_rounding(NETWORKS[name]()))
    if isinstance(network, VQAutoencoder):
        codes, pixels = outputs_of(network)
        drawn = codes.to(torch.uint8), (pixels * 255).round().to(torch.uint8)
    else:
        diffusion = AbsorbingDiffusion(8, 64)
        noise = diffusion.noise(3, range(6), GRID, 8, "spread")
        condition = torch.zeros(6, 2, dtype=torch.long) if network.conditions else None
        drawn = (diffusion.sample(network.logits_at, noise, condition=condition),)
    assert digest(*drawn) == DIGESTS[name]


REFUSED = {
    "a layer of PLIF neurons": partial(SDID, 8, 2, 4, neuron=PLIF),
    "a time constant of 3": partial(SDID, 8, 2, 4, neuron=partial(LIF, 3.0)),
    "a layer of LIF neurons": partial(SDID, 8, 2, 4, neuron=partial(LIF, v_reset=None)),
    "only spiking networks": VQVAE,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_in_whole_numbers_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        integer.in_whole_numbers(REFUSED[reason]())


# ---- of a run ----


@pytest.fixture(scope="module")
def run(cli, grey, tmp_path_factory):
    result = tmp_path_factory.mktemp("integer")
    assert cli(*grey, *without(IMPROVED, "--metrics"), "--result_path", result).status == 0
    return run_in(result)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("packed") / "whole"
    pack.main([str(run), str(copy), "--integer"])
    return copy


def test_a_packed_run_draws_and_is_evaluated(run, whole, cli, grey):
    for name in ("model.pth", "diff_result/diff_model.pth"):
        stored = load_checkpoint(whole / name)
        large = [value for value in stored.values() if value.dim() > 1]
        assert large and {value.dtype for value in large} <= {torch.int8, torch.uint8}
        assert not any("running" in key for key in stored)
    outcome = cli("--checkpoint", whole, "--stage", "sample", "--num_samples", 3)
    assert (outcome.status, outcome.err) == (0, "") and "fs, digits 4 (in whole numbers)" in outcome.out
    for folder in (run, whole):
        assert cli("--checkpoint", folder, *grey[2:4], "--metrics", "energy,mse", "--num_samples", 5).status == 0
    before, after = read_metrics(run), read_metrics(whole)
    for name in ("mse", "energy_encode", "energy_decode", "energy_denoiser_pass", "firing_rate"):
        assert after[name]["value"] == pytest.approx(before[name]["value"], rel=0.1)
    same = "energy_decode_without_spikes"
    assert after[same]["value"] == before[same]["value"] > 0


def test_a_run_of_the_papers_networks(finished, cli, grey, tmp_path):
    """It does in whole numbers what it does without, at the same cost."""
    pack.main([str(finished.path), str(tmp_path / "whole"), "--integer"])
    outcome = cli("--checkpoint", tmp_path / "whole", *grey[2:4], "--metrics", "energy,mse", "--num_samples", 5)
    assert (outcome.status, outcome.err) == (0, "")
    assert "lif, tau 2" in outcome.out and "(in whole numbers)" in outcome.out
    before, after = read_metrics(finished.path), read_metrics(tmp_path / "whole")
    for name in ("mse", "energy_encode", "energy_decode", "energy_denoiser_pass", "firing_rate"):
        assert after[name]["value"] == pytest.approx(before[name]["value"], rel=0.1)


def test_what_cannot_be_done_with_it(whole, cli, grey, tmp_path):
    outcome = cli(*grey, "--start_from", whole, "--result_path", tmp_path)
    assert outcome.status == 2 and "is in whole numbers, which cannot be trained" in outcome.err
    with pytest.raises(SystemExit):
        pack.main([str(whole), str(tmp_path / "again"), "--integer", "--int8"])


def test_weights_come_back_as_they_were(run, whole):
    network = integer.in_whole_numbers(ResidualSVAE(1, 8, 1, 8, 2, neuron=FewSpikes))
    weights = load_weights(whole / "model.pth")
    network.load_state_dict(weights)
    fresh = ResidualSVAE(1, 8, 1, 8, 2, neuron=FewSpikes)
    fresh.load_state_dict(load_weights(run / "model.pth"))
    expected = integer.in_whole_numbers(fresh).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert network.eval().encode(to_float(images)).shape == (1, 16, 16)
