"""Convolutions computed from events against dense ones: outputs and gradients, at any share of spikes."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import layer_by_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from diffusion.absorbing import AbsorbingDiffusion
from models import reference
from models.kernels import compiled, event_conv
from models.sdid import SDID
from models.spiking import SpikingStack, convolve, convolve_at, convolve_spikes

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")

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
    spikes = spikes.detach().requires_grad_(spikes.is_floating_point())
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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
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


TYPES = {
    "float32": (torch.float32, torch.float32, None),
    "float64": (torch.float64, torch.float64, None),
    "bfloat16": (torch.float32, torch.bfloat16, torch.bfloat16),
}
"""Weights, inputs and autocast of the layers that the kernels compute."""

OTHER_TYPES = {
    "float16": (torch.float16, torch.float16, None),
    "all bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "autocast to float16": (torch.float32, torch.float32, torch.float16),
    "autocast of float64": (torch.float64, torch.float64, torch.bfloat16),
    "bfloat16 beside float32": (torch.float32, torch.bfloat16, None),
    "float64 beside float32": (torch.float32, torch.float64, None),
    "integers": (torch.float32, torch.int64, None),
}
ODD = ("groups", "reflect", "circular", "replicate", "same", "valid", "no image", "input", "weight", *OTHER_TYPES)


@st.composite
def layers(draw, types):
    """A convolution, its input, and the type of autocast: half of them are odd in one way."""

    def one(*values):
        return draw(st.sampled_from(values))

    def pair(*values):
        return one(*((value, value) for value in values)) if one(True, False) else (one(*values), one(*values))

    torch.manual_seed(one(*range(99)))
    odd = one(*ODD) if one(True, False) else None
    groups = 3 if odd == "groups" else 1
    channels = [groups * one(1, 4, 9, 70) for _ in range(2)]
    options = dict(kernel_size=pair(1, 2, 3), stride=pair(1, 2, 3), dilation=pair(1, 2), groups=groups, bias=False)
    padding = pair(0, 1, 2)
    if one(True, False):
        conv = nn.ConvTranspose2d(*channels, **options, padding=padding, output_padding=pair(0, 0, 0, 1))
    else:
        padding = odd if odd in {"same", "valid"} else padding
        mode = odd if odd in {"reflect", "circular", "replicate"} else "zeros"
        options.update(stride=1) if odd == "same" else None
        conv = nn.Conv2d(*channels, **options, padding=padding, padding_mode=mode)
    x = spikes_of(one(0, 0.02, 0.1, 0.5, 1), 0 if odd == "no image" else 3, channels[0], *pair(5, 7, 8))
    strange = one(math.nan, math.inf, -1.0, 0.5)
    if odd == "input":
        x.view(-1)[one(0, -1)] = strange
    conv.weight.data.view(-1)[-1] = strange if odd == "weight" else 0.5
    layout = one("contiguous", "channels last", "transposed", "every other")
    x, conv.weight = in_layout(layout, x), nn.Parameter(in_layout(layout, conv.weight.detach()))
    weights, inputs, autocast = OTHER_TYPES.get(odd, types)
    return conv.to(weights), x.to(inputs), autocast


def in_layout(layout, values):
    """The same values `[A,B,C,D]`, in other places of the memory."""
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.mT.contiguous().mT
    return values.repeat_interleave(2, -1)[..., ::2] if layout == "every other" else values


@pytest.mark.parametrize("types", TYPES)
def test_any_layer_computes_what_torch_computes(types, with_threads):
    """Output and gradients, or the same error; what the kernels compute, against the same layer in float64."""
    with_threads(1)  # layers this small gain nothing from several threads
    by_events = {nn.Conv2d: 0, nn.ConvTranspose2d: 0}

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(layers(TYPES[types]))
    def compare(layer):
        conv, x, autocast = layer
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            try:
                expected = run(conv, x, nn.Module.__call__)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    run(conv, x, convolve_spikes)
                return
            results = run(conv, x, convolve_spikes)
            events = event_conv.convolve(conv, x) is not None
        if not events:
            for ours, theirs in zip(results, expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)
            return
        by_events[type(conv)] += 1
        exact = copy.deepcopy(conv).to(expected[0].dtype).double()
        for ours, theirs, truth in zip(results, expected, run(exact, x.double(), nn.Module.__call__), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            unit = torch.finfo(expected[0].dtype).eps * max(1.0, float(truth.abs().max()))
            off, dense_off = (float((each.double() - truth).abs().max()) for each in (ours, theirs))
            assert off <= max(20 * unit, 1.01 * dense_off)

    compare()
    assert min(by_events.values()) > 20


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_zero_times_infinity_is_no_zero_in_the_weight_gradient(value):
    """A training that diverges must not look as if it did not."""
    gradients = []
    for function in (convolve_spikes, nn.Module.__call__):
        torch.manual_seed(0)
        conv = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        out = function(conv, spikes_of(0.1, 4, 6, 5, 5, dtype=torch.float32))
        grad = torch.ones_like(out)
        grad[2, 3, 2, 2] = value
        out.backward(grad)
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(*gradients, equal_nan=True)
    assert not gradients[0][3].isfinite().any() and gradients[0][[0, 1, 2, 4]].isfinite().all()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(*arguments, **options):
    conv = nn.Conv2d(*arguments, **options)
    conv.register_forward_hook(lambda conv, inputs, out: 2 * out)
    return conv


def patched(*arguments, **options):
    conv = nn.Conv2d(*arguments, **options)
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)
    return conv


def normalised(*arguments, **options):
    """Its weights change at each call."""
    return nn.utils.spectral_norm(nn.Conv2d(*arguments, **options))


CHANGED = {
    "plain": partial(nn.Conv2d, kernel_size=3, padding=1),
    "no bias": partial(nn.Conv2d, kernel_size=3, padding=1, bias=False),
    "dilation": partial(nn.Conv2d, kernel_size=3, padding=2, dilation=2),
    "groups": partial(nn.Conv2d, kernel_size=3, padding=1, groups=3),
    "rectangle": partial(nn.Conv2d, kernel_size=(3, 5), padding=(1, 2)),
    "same": partial(nn.Conv2d, kernel_size=3, padding="same"),
    "circular": partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="circular"),
    "subclass": partial(Doubled, kernel_size=3, padding=1),
    "hook": partial(hooked, kernel_size=3, padding=1),
    "forward": partial(patched, kernel_size=3, padding=1),
    "spectral norm": partial(normalised, kernel_size=3, padding=1),
}
"""Convolutions that keep the size of the grid."""

UNEQUAL = {
    "unequal": partial(nn.Conv2d, kernel_size=(3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "transposed": partial(nn.ConvTranspose2d, kernel_size=(3, 2), stride=2, output_padding=(1, 0), groups=3),
}


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "spikes"])
@pytest.mark.parametrize("place", ["block", "head"])
@pytest.mark.parametrize("make", CHANGED | UNEQUAL)
def test_a_stack_computes_any_convolution_as_the_module_that_it_is(make, place, constant):
    """Also one with hooks, or a forward of its own: kernels may only stand in for those of torch."""
    torch.manual_seed(1)
    conv = (CHANGED | UNEQUAL)[make](3, 6)
    layers, head = ([conv, nn.Conv2d(6, 3, 3, padding=1)], None) if place == "block" else ([nn.Conv2d(3, 3, 1)], conv)
    stack = SpikingStack(*layers, head=head, spike_steps=4).double()
    for norm in (layer for layer in stack if isinstance(layer, nn.BatchNorm2d)):
        nn.init.constant_(norm.bias, 1.0)
    x = spikes_of(0.3, *(() if constant else (4,)), 2, 3, 7, 8)
    weights, results, state = torch.linspace(0.5, 1, 4).double(), [], copy.deepcopy(stack.state_dict())
    for compute in (layer_by_layer, SpikingStack.__call__):
        stack.load_state_dict(state)
        stack.zero_grad()
        out = compute(stack, x, weights)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in stack.parameters() if p.dim() > 1)])
    for literal, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, literal, rtol=1e-8, atol=1e-8 * max(1.0, float(literal.abs().max())))
    assert results[0][0].any()


def test_what_the_kernels_cannot_read_is_left_to_torch():
    conv, spikes = nn.Conv2d(3, 4, 3, padding=1), spikes_of(0.3, 2, 3, 5, 5, dtype=torch.float32)
    elsewhere = copy.deepcopy(conv).to("meta")
    for layer, x in (
        (conv, spikes.to("meta")),
        (elsewhere, spikes),
        (elsewhere, spikes.to("meta")),
        (conv, spikes.to_sparse()),
        (conv, spikes[0]),
        (conv, spikes[:, :2]),
        (conv, spikes[:0]),
    ):
        assert event_conv.convolve(layer, x) is None
    for make in ("subclass", "hook", "forward", "spectral norm"):
        assert event_conv.convolve(CHANGED[make](3, 4), spikes) is None
    with torch.no_grad():
        at = (spikes.flatten(2).mT, torch.zeros(1, 9, dtype=torch.int32))
        for layer, x in ((conv, at[0][:, :, :2]), (elsewhere, at[0]), (conv, at[0].to("meta"))):
            assert event_conv.convolve_at(layer, x, at[1]) is None
        torch.testing.assert_close(event_conv.convolve_at(conv, *at), convolve_at(conv, *at))
    with torch.device("meta"):  # where torch makes tensors if nobody says
        torch.testing.assert_close(event_conv.convolve(conv, spikes), convolve(conv, spikes))


def test_a_second_derivative_is_refused():
    """Rather than missing what depends on the first one."""
    conv, spikes = nn.Conv2d(3, 4, 3, padding=1), spikes_of(0.3, 2, 3, 5, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(event_conv.convolve(conv, spikes).sum(), conv.weight, create_graph=True)
    literal = reference.blocks(SpikingStack(conv, spike_steps=2), torch.stack((spikes, spikes)))
    torch.autograd.grad(literal.sum(), conv.weight, create_graph=True)


def test_several_threads_compute_at_once(with_threads):
    """Each with another number of threads of its own."""
    torch.manual_seed(0)
    conv = nn.Conv2d(20, 70, 3, padding=1)
    inputs = [spikes_of(0.1, 8, 20, 7, 7, dtype=torch.float32, seed=seed) for seed in range(12)]

    def compute(number):
        torch.set_num_threads(1 + number % 3)
        layer = copy.deepcopy(conv)
        return run(layer, inputs[number], convolve_spikes)

    alone = [compute(number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(compute, range(12)), strict=True):
            assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


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
    monkeypatch.setattr(compiled, "available", lambda: False)
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
    for compute in (reference.sdid, SDID.__call__):
        model.load_state_dict(state)
        model.zero_grad()
        logits = compute(model, tokens, t)
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
    assert torch.equal(reference.sample(partial(reference.sdid, model), *noise, 10), by_events)
    assert len(by_events.unique()) > 5


NORMS = {
    "batch statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "group norm": lambda channels: nn.GroupNorm(1, channels),
}


@torch.no_grad()
@pytest.mark.parametrize("place", ["conv3", "conv5", "conv6"])
@pytest.mark.parametrize("change", [*CHANGED, *NORMS])
def test_logits_at_chosen_positions_whatever_the_layers(change, place, float64):
    """Where an output depends on more than its 3x3 neighbours, everything is computed."""
    torch.manual_seed(0)
    model = SDID(codebook_size=6, spike_steps=4, denoiser_channels=3)
    tokens, t, where = torch.randint(0, 7, (6, 5, 5)), torch.randint(1, 26, (6,)), torch.rand(6, 5, 5) < 0.1
    layers = model.get_submodule(place)
    if change in CHANGED:
        conv = layers[0]
        layers[0] = CHANGED[change](conv.in_channels, conv.out_channels)
    elif len(layers) > 1:
        layers[1] = NORMS[change](layers[1].num_features)
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm)):
        nn.init.constant_(norm.weight, 2.0)
        nn.init.constant_(norm.bias, 1.0)
    for _ in range(20):
        model(tokens, t)
    model.eval()
    rates = []
    for block in (model.conv2, model.conv3, model.conv4):
        block.register_forward_hook(lambda block, inputs, spikes: rates.append(spikes.mean()))
    expected = model(tokens, t).permute(0, 2, 3, 1)[where]
    assert len(rates) == 3 and min(rates) > 0.05 and expected.std() > 0
    torch.testing.assert_close(model.logits_at(tokens, t, where), expected)
