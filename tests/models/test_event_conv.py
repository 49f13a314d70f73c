"""Convolutions computed from events against dense ones: outputs and gradients, at any share of spikes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion.absorbing import AbsorbingDiffusion
from models import event_conv, fused_lif
from models.sdid import SDID
from models.spiking import convolve, convolve_at, convolve_spikes, use_backend

pytestmark = pytest.mark.skipif(not fused_lif.available(), reason="no C++ compiler")

LAYERS = {
    "3x3": nn.Conv2d(70, 67, 3, padding=1),
    "one channel": nn.Conv2d(1, 1, 3, padding=1),
    "whole tiles": nn.Conv2d(64, 128, 3, padding=1),
    "1x1": nn.Conv2d(5, 130, 1),
    "stride 2": nn.Conv2d(5, 9, 3, stride=2, padding=1),
    "transposed": nn.ConvTranspose2d(9, 5, 3, padding=1),
    "transposed, stride 2": nn.ConvTranspose2d(9, 70, 3, stride=2, padding=1, output_padding=1),
}


def spikes_of(share, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator) < share).to(dtype)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Events at any share of spikes, in layers of any width."""
    monkeypatch.setattr(event_conv, "NARROWEST", 1)
    monkeypatch.setattr(event_conv, "LARGEST_SHARE", dict.fromkeys(event_conv.LARGEST_SHARE, 1))


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(conv, spikes, function):
    """Output, and gradients of spikes and weights, of the convolution that `function` computes."""
    spikes = spikes.clone().requires_grad_()
    conv.zero_grad()
    out = function(conv, spikes)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return out.detach(), spikes.grad, conv.weight.grad.clone()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("size", [(7, 7), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_events_equal_the_dense_convolution(layer, size, images, share):
    conv = LAYERS[layer].double()
    spikes = spikes_of(share, images, conv.in_channels, *size)
    assert event_conv.convolve(conv, spikes) is not None
    for by_events, dense in zip(run(conv, spikes, convolve_spikes), run(conv, spikes, convolve), strict=True):
        torch.testing.assert_close(by_events, dense, rtol=1e-12, atol=1e-12 * max(1, float(dense.abs().max())))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_the_types_that_networks_compute_in(dtype, error, share, layout):
    """As exact as a sum of rounded values can be, or as the dense convolution of this processor, if that is worse.

    There are more outputs than a block of the weight gradient has; weights stay float32, and so does their gradient.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(33, 70, 3, padding=1).to(memory_format=layout)
    spikes = spikes_of(share, 80, 33, 7, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        results = [run(conv, spikes, function) for function in (convolve_spikes, convolve)]
    exact = nn.Conv2d(33, 70, 3, padding=1).double()
    exact.load_state_dict({name: value.to(dtype).double() for name, value in conv.state_dict().items()})
    for by_events, dense, truth in zip(*results, run(exact, spikes.double(), convolve), strict=True):
        assert by_events.dtype == dense.dtype
        allowed = error * max(1.0, float(truth.abs().max()))
        off, dense_off = (float((each.double() - truth).abs().max()) for each in (by_events, dense))
        assert off <= max(allowed, 1.01 * dense_off)


def test_weight_gradient_by_finite_differences():
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    spikes = spikes_of(0.2, 2, 3, 4, 5)

    def output(weight):
        return torch.func.functional_call(Convolution(conv), {"conv.weight": weight}, spikes)

    assert torch.autograd.gradcheck(output, conv.weight)


class Convolution(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, spikes):
        return convolve_spikes(self.conv, spikes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(with_threads, dtype):
    torch.manual_seed(0)
    conv, spikes = nn.Conv2d(20, 130, 3, padding=1), spikes_of(0.1, 90, 20, 7, 7, dtype=dtype)
    found = []
    for threads in (1, 2, 3, 3):
        with_threads(threads)
        out = event_conv.convolve(conv, spikes)
        out.backward(torch.ones_like(out))
        found.append((out.detach(), conv.weight.grad.clone()))
        conv.zero_grad()
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(gradient, found[0][1])


@torch.no_grad()
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_events_at_chosen_positions(share):
    conv = nn.Conv2d(70, 67, 3, padding=1).double()
    spikes, rows = spikes_of(share, 4, 30, 70), torch.randint(0, 31, (11, 9))
    expected = convolve_at(conv, spikes, rows)
    torch.testing.assert_close(event_conv.convolve_at(conv, spikes, rows), expected)
    assert event_conv.convolve_at(conv, spikes, rows[:0]).shape == (4, 0, 67)
    with torch.enable_grad():
        assert event_conv.convolve_at(conv, spikes, rows) is None, "it would have no gradient"


def test_dense_where_it_is_faster_or_the_input_is_no_spikes(monkeypatch):
    conv, spikes = nn.Conv2d(3, 4, 3, padding=1), spikes_of(0.3, 2, 3, 10, 10, dtype=torch.float32)
    assert event_conv.convolve(conv, spikes) is not None
    for value in (0.5, 2.0, -1.0, float("nan")):
        changed = spikes.clone()
        changed[1, 2, 3, 4] = value
        assert event_conv.convolve(conv, changed) is None
        torch.testing.assert_close(convolve_spikes(conv, changed), convolve(conv, changed), equal_nan=True)
    with monkeypatch.context() as only_few:
        only_few.setitem(event_conv.LARGEST_SHARE, torch.float32, 0.2)
        assert event_conv.convolve(conv, spikes) is None
    assert event_conv.convolve(conv, spikes) is not None
    monkeypatch.setattr(event_conv, "NARROWEST", 4)
    assert event_conv.convolve(conv, spikes) is None


def test_dense_without_a_compiler(monkeypatch):
    conv, spikes = nn.Conv2d(3, 4, 3, padding=1), spikes_of(0.1, 2, 3, 5, 5, dtype=torch.float32)
    monkeypatch.setattr(event_conv, "available", lambda: False)
    assert event_conv.convolve(conv, spikes) is None
    assert torch.equal(convolve_spikes(conv, spikes), convolve(conv, spikes))
    with torch.no_grad():
        assert event_conv.convolve_at(conv, spikes.flatten(2).transpose(1, 2), torch.zeros(1, 9).long()) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_denoiser_computes_the_same_from_events(training, monkeypatch):
    torch.manual_seed(0)
    model = SDID(codebook_size=10, spike_steps=4, denoiser_channels=4).double()
    tokens, t = torch.randint(0, 11, (6, 5, 5)), torch.randint(1, 26, (6,))
    for _ in range(30):
        model(tokens, t)
    model.train(training)
    state, results = {name: value.clone() for name, value in model.state_dict().items()}, []
    kernels = []
    original = event_conv.call
    monkeypatch.setattr(event_conv, "call", lambda name, *rest: kernels.append(name) or original(name, *rest))
    for backend in ("reference", "fast"):
        model.load_state_dict(state)
        model.zero_grad()
        with use_backend(backend):
            logits = model(tokens, t)
            F.cross_entropy(logits, tokens.clamp_max(9)).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain_value, fast_value in zip(*results, strict=True):
        torch.testing.assert_close(fast_value, plain_value, rtol=1e-9, atol=1e-12)
    assert kernels.count("event_forward_float64") == kernels.count("event_backward_float64") == 4


def test_the_sampler_draws_the_plain_codes_from_events():
    """In float64: nothing hangs on a rounding."""
    torch.manual_seed(0)
    model, diffusion = SDID(codebook_size=10, spike_steps=4, denoiser_channels=4).double(), AbsorbingDiffusion(10, 25)
    for _ in range(30):
        model(torch.randint(0, 11, (6, 5, 5)), torch.randint(1, 26, (6,)))
    noise = diffusion.noise(0, range(12), (5, 5))
    by_events = diffusion.sample(model.eval().logits_at, noise)
    with use_backend("reference"):
        assert torch.equal(diffusion.sample_every_timestep(model, noise), by_events)
    assert len(by_events.unique()) > 5
