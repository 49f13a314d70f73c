"""Networks in whole numbers: nothing rounds, so the bits are the same whatever computes them."""

import hashlib
from functools import partial

import pytest
import torch
from helpers import IMPROVED, read_metrics, run_in, without
from torch import nn

from diffusion.absorbing import AbsorbingDiffusion
from models import ResidualSDID, ResidualSVAE, UNetSDID, integer
from models.kernels import compiled
from models.neurons import LIF, FewSpikes
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
}


def without_rounding(network):
    """Give a network weights that are the same on every processor: small whole numbers, some of them divided by 7."""
    random = torch.Generator().manual_seed(5)
    for name, value in network.state_dict().items():
        if name == "prototypes.grids":
            value.copy_(torch.randint(8, value.shape, generator=random))
        elif value.is_floating_point() and "embeddings" not in name:
            small = torch.randint(-60, 61, value.shape, generator=random, dtype=torch.float32)
            value.copy_(small.abs() / 40 + 0.5 if name.endswith(("norm.weight", "running_var")) else small / 7 / 30)
    return network.eval()


@pytest.fixture(params=NETWORKS)
def trained(request):
    return without_rounding(NETWORKS[request.param]())


def inputs_of(network):
    random = torch.Generator().manual_seed(6)
    if isinstance(network, ResidualSVAE):
        return (torch.randint(256, (4, network.channels, 16, 16), generator=random).float() / 255,)
    tokens = torch.randint(9, (4, *GRID), generator=random)
    return tokens, torch.ones(4), torch.tensor([[0, 1], [2, -1], [-1, 0], [-1, -1]])


@torch.no_grad()
def outputs_of(network):
    """Logits, or codes and pixels."""
    inputs = inputs_of(network)
    if isinstance(network, ResidualSVAE):
        codes = network.encode(*inputs)
        return codes, network.decode(codes)
    return (network(*inputs),)


def digest(*tensors):
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def test_a_row_is_int8_times_the_best_power_of_two():
    weight = torch.tensor([[127.0, 1, 1], [128.0, 1, 1], [0.5, 0.26, 0.1], [0.0, 0, 0], [1e-9, 0, 0]])
    scales = integer.row_scales(weight)
    assert (torch.frexp(scales).mantissa == 0.5).all(), "powers of two"
    assert scales[:3].tolist() == [1, 1, 2**-7], "128 is clipped to 127, which costs less than halving all others"
    rounded = integer.whole(weight)
    assert torch.equal(integer.whole(rounded), rounded) and torch.equal(integer.row_scales(rounded), scales)
    assert (rounded[2] - weight[2]).abs().max() <= 2**-8 and not rounded[3].any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("digits", [2, 4])
def test_thresholds_are_those_of_batch_norm_and_neuron(sign, digits):
    """Currents that are no nearer than two units to a threshold are answered as by the network itself."""
    firing = Firing(3, 1, 1.0, partial(FewSpikes, digits)).eval()
    firing.norm.weight.data = sign * torch.tensor([0.3, 1.0, 4.0])
    firing.norm.running_mean.copy_(torch.tensor([1.5, -0.2, 0.0]))
    neurons, last = integer.IntegerNeurons(firing), FEW_SPIKES_RANGE / 2**digits
    x = integer.in_units(torch.linspace(-6, 6, 30_001)).view(-1, 1, 1, 1).expand(-1, 3, -1, -1)
    counts, expected = neurons(x[None]), firing(x)
    either_side = [firing(x + 4 * side * integer.UNIT) for side in (-1, 1)]
    sure = (either_side[0] == expected) & (either_side[1] == expected)
    assert counts.dtype == torch.uint8 and sure.double().mean() > 0.98
    assert torch.equal(counts[sure] * last, expected[sure])


def test_both_ways_of_counting_agree(monkeypatch):
    """Also at the thresholds themselves, for float32 and float64."""
    steps, offset = torch.tensor([1.0, -3.0, 7.0, 2**20]) * integer.UNIT, torch.tensor([0.0, 2.0, -5.0, 1.0])
    x = torch.arange(-4000, 4000).view(-1, 1, 1, 1) * integer.UNIT * torch.tensor([1.0, 1, 1, 2**9]).view(1, 4, 1, 1)
    for dtype in (torch.float32, torch.float64):
        fast = integer._count_thresholds(x.to(dtype), offset, steps, 15)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has", lambda kernel: False)
            slow = integer._count_thresholds(x.to(dtype), offset, steps, 15)
        exact = ((x.double() + offset.view(1, 4, 1, 1)) / steps.double().view(1, 4, 1, 1)).floor().clamp(0, 15)
        assert torch.equal(fast[0], slow[0]) and torch.equal(fast[0], exact.to(torch.uint8)) and not fast[1] | slow[1]
    x[0] = integer.LARGEST_CURRENT
    assert integer._count_thresholds(x, offset, steps, 15)[1], "too large a current is no silent mistake"


def test_int8_and_float64_give_the_same_bits(trained, monkeypatch):
    network = integer.in_whole_numbers(trained)
    fast = outputs_of(network)
    monkeypatch.setattr(integer, "_has_int8", lambda x: False)
    monkeypatch.setattr(compiled, "has", lambda kernel: False)
    assert all(torch.equal(one, other) for one, other in zip(fast, outputs_of(network), strict=True))


def test_nothing_rounds(trained, monkeypatch):
    """With all channels of every layer in another order of summation, the bits are the same."""
    network = integer.in_whole_numbers(trained)
    before = outputs_of(network)
    monkeypatch.setattr(integer, "_has_int8", lambda x: False)
    convolve = nn.functional.conv2d

    def backwards(x, weight, bias, stride, padding, dilation, groups):
        x, weight = x.float(), weight.float()  # in float32, whose sums would tell their order if they were rounded
        if groups == 1:
            return convolve(x.flip(1), weight.flip(1), bias, stride, padding, dilation).double()
        return convolve(x, weight, bias, stride, padding, dilation, groups).double()

    monkeypatch.setattr(integer.F, "conv2d", backwards)
    assert all(torch.equal(one, other) for one, other in zip(before, outputs_of(network), strict=True))


DIGESTS = {
    "residual-svae": "a466a0ce09e0986d",
    "two levels": "56b7e5ee6b549d05",
    "residual": "7d19b2b4e2059a7c",
    "unet": "1aa1035c0f60ce29",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_on_every_processor(name):
    """Of pixels and codes, and of codes that are drawn."""
    network = integer.in_whole_numbers(without_rounding(NETWORKS[name]()))
    if isinstance(network, ResidualSVAE):
        codes, pixels = outputs_of(network)
        drawn = codes.to(torch.uint8), (pixels * 255).round().to(torch.uint8)
    else:
        diffusion = AbsorbingDiffusion(8, 64)
        noise = diffusion.noise(3, range(6), GRID, 8, "spread")
        drawn = (diffusion.sample(network.logits_at, noise, condition=torch.zeros(6, 2, dtype=torch.long)),)
    assert digest(*drawn) == DIGESTS[name]


def test_other_neurons_are_refused():
    with pytest.raises(ValueError, match="only networks of residual blocks with --neuron fs"):
        integer.in_whole_numbers(UNetSDID(8, 1, 48, 1, grid=GRID, neuron=LIF))


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
