"""Batch norm and neurons in one kernel: what it computes, and what it leaves to torch."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import as_modules, layer_by_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from models.kernels import compiled, fused_lif
from models.neurons import IF, LIF, PLIF, FewSpikes, dynamics_of
from models.spiking import Firing, SpikingStack, fire, membrane_weights

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that were called."""
    names, original = [], fused_lif.call
    monkeypatch.setattr(fused_lif, "call", lambda name, *rest: names.append(name) or original(name, *rest))
    return names


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Halved(LIF):
    def forward(self, x):
        return super().forward(x / 2)


def changed(lif=None, **values):
    """The paper's neuron with other values of some attributes."""
    lif = lif or LIF()
    for name, value in values.items():
        setattr(lif, name, value)
    return lif


def hooked():
    lif = LIF()
    lif.register_forward_hook(lambda lif, inputs, spikes: spikes / 2)
    return lif


OTHERS = {
    "learned threshold": lambda: changed(v_threshold=nn.Parameter(torch.tensor(1.0))),
    "soft reset": lambda: changed(v_reset=None),
    "reset": lambda: changed(v_reset=0.3),
    "IF's soft reset": lambda: IF(v_reset=None),
    "PLIF's reset": lambda: PLIF(v_reset=0.3),
    "no decay of the input": lambda: changed(decay_input=False),
    "detached reset": lambda: changed(detach_reset=True),
    "all potentials": lambda: changed(store_v_seq=True),
    "surrogate": lambda: changed(surrogate_function=surrogate.Sigmoid()),
    "slope": lambda: changed(surrogate_function=surrogate.ATan(3.0)),
    "no spikes": lambda: changed(surrogate_function=surrogate.ATan(2.0, spiking=False)),
    "subclass": Halved,
    "hook": hooked,
    "SpikingJelly's IF": lambda: neuron.IFNode(step_mode="m"),
    "SpikingJelly's LIF": lambda: neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(2.0)),
    "SpikingJelly's PLIF": lambda: neuron.ParametricLIFNode(step_mode="m"),
}


def compare(stack, x, readout):
    """That a stack computes what its layers do, or fails alike: output, gradients, running statistics."""
    state, results = copy.deepcopy(stack.state_dict()), []
    for compute in (layer_by_layer, SpikingStack.__call__):
        stack.load_state_dict(state)
        stack.zero_grad()
        for layer in stack:
            if isinstance(layer, neuron.BaseNode):
                layer.reset()
        inputs = x.detach().requires_grad_()
        try:
            out = compute(stack, inputs, readout)
        except (RuntimeError, ValueError) as error:
            results.append(type(error))
            continue
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients = [inputs.grad, *(p.grad for p in stack.parameters() if p.grad is not None)]
        results.append([out.detach(), *gradients, *(b.double().clone() for b in stack.buffers())])
    literal, fast = results
    if isinstance(literal, type) or isinstance(fast, type):
        assert literal is fast
        return None
    for theirs, ours in zip(literal, fast, strict=True):
        scale = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * scale, equal_nan=True)
    return literal[0]


@pytest.mark.parametrize("readout", [True, False], ids=["readout", "all_steps"])
@pytest.mark.parametrize("name", OTHERS)
def test_no_kernel_computes_another_neuron(name, readout, calls):
    torch.manual_seed(0)
    stack = SpikingStack(nn.Conv2d(3, 8, 3, padding=1), spike_steps=5).double()
    nn.init.constant_(stack[1].bias, 1.0)
    x, weights = torch.rand(4, 3, 5, 5).double(), membrane_weights(5, like=stack[1].bias) if readout else None
    assert compare(stack, x, weights).any()
    assert calls and dynamics_of(stack[2]) == fused_lif.PAPERS
    calls.clear()
    stack[2] = OTHERS[name]().double()
    assert compare(stack, x, weights).any()
    assert not calls and dynamics_of(stack[2]) is None


@pytest.mark.parametrize(
    "values",
    [
        *(dict(tau=3.0), dict(v_threshold=0.7), dict(v_reset=None), dict(v_reset=0.3), dict(decay_input=False)),
        *(dict(detach_reset=True), dict(store_v_seq=True), dict(surrogate_function=surrogate.Sigmoid())),
    ],
    ids=str,
)
def test_lif_obeys_its_attributes_as_that_of_spikingjelly_does(values):
    current, results = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) + 1, []
    theirs = neuron.LIFNode(surrogate_function=surrogate.ATan(2.0), step_mode="m")
    for lif in (changed(**values), changed(theirs, **values)):
        x = current.clone().requires_grad_()
        spikes = lif(x)
        (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes)).sum().backward()
        results.append((spikes.detach(), x.grad, lif.v_seq if lif.store_v_seq else torch.empty(0)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


@st.composite
def blocks(draw):
    """A block of any kind, with any neuron that the kernels compute, its input and readout."""

    def one(*values):
        return draw(st.sampled_from(values))

    torch.manual_seed(one(*range(99)))
    steps, images = one(1, 2, 5), one(3, 3, 3, 1, 0)
    channels = one(1, 5, 70)
    values = dict(v_threshold=one(1.0, 1.0, 0.4, 1.7))
    kind = one(LIF, LIF, IF, PLIF, PLIF, FewSpikes)
    values |= {} if kind is IF else dict(tau=one(2.0, 1.3, 5.0))
    neuron = partial(FewSpikes, one(1, 4)) if kind is FewSpikes else partial(kind, **values)
    stack = SpikingStack(nn.Conv2d(2, channels, 1, bias=one(True, False)), spike_steps=steps, neuron=neuron).double()
    stack[2].requires_grad_(one(True, True, False))
    options = dict(momentum=one(0.1, 0.0, None), eps=one(1e-5, 0.1))
    odd = one(dict(affine=False), dict(track_running_stats=False)) if one(*(6 * [False]), True) else {}
    stack[1] = norm = nn.BatchNorm2d(channels, **options, **odd).double()
    for values in norm.parameters():
        nn.init.uniform_(values, 0.5, 1.5)
    stack.train(one(True, False))
    norm.train(one(norm.training, norm.training, True, False))
    norm.track_running_stats &= one(True, True, True, False)
    norm.requires_grad_(one(True, True, False))
    x = torch.randn(*(() if one(True, False) else (steps,)), images, 2, *one((1, 1), (3, 2), (9, 9))).double()
    readout = membrane_weights(steps, like=x) if one(True, False) else None
    if readout is not None:
        readout.requires_grad_(one(*(6 * [False]), True))
    return stack, x, readout


def test_any_block_computes_what_torch_computes(calls, with_threads):
    with_threads(1)
    computed = {"forward": 0, "backward": 0, "moments": 0, "torch": 0, LIF: 0, IF: 0, PLIF: 0, FewSpikes: 0}

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(blocks())
    def check(block):
        calls.clear()
        compare(*block)
        for name in calls or ["torch"]:
            computed[name.split("_")[0]] = computed.get(name.split("_")[0], 0) + 1
        computed[type(block[0][2])] += bool(calls)

    check()
    assert min(computed["forward"], computed["backward"]) > 90 and computed["moments"] > 40 and computed["torch"] > 10
    assert min(computed[kind] for kind in (LIF, IF, PLIF, FewSpikes)) > 20


KINDS = {"lif": LIF, "lif, tau 3": partial(LIF, 3.0, 0.5**0.5), "if": IF, "plif": partial(PLIF, 3.0), "fs": FewSpikes}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readout", [True, False], ids=["readout", "all_steps"])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "each_step"])
def test_spikes_and_gradients_are_those_of_spikingjelly(kind, dtype, readout, constant, calls):
    """In every type, on currents that no rounding moves across the threshold: multiples of 1/8, moved by 0.01."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    generator, results = torch.Generator().manual_seed(0), []
    currents = torch.randint(-8, 24, (20, 3, 5, 5) if constant else (4 * 20, 3, 5, 5), generator=generator) / 8
    target = torch.linspace(-1, 1, (1 if readout else 4) * 20 * 3 * 25).to(parameters)
    weights = membrane_weights(4, like=target) if readout else None
    for context in (as_modules, nullcontext):
        norm, layer = nn.BatchNorm2d(3, eps=0).to(parameters).eval(), KINDS[kind]().to(parameters)
        nn.init.constant_(norm.bias, 0.01)
        x = currents.to(dtype).requires_grad_()
        with context(layer):
            out = fire(norm, layer, x, 4, bias=torch.zeros(3, dtype=parameters), readout=weights, constant=constant)
        (out.flatten() * target).sum().backward()
        gradients = (x.grad, norm.weight.grad, norm.bias.grad, *(p.grad for p in layer.parameters()))
        results.append([out.detach(), *gradients])
    assert calls and len(results[0]) == (5 if kind == "plif" else 4)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for theirs, ours in zip(*results, strict=True):
        assert theirs.any() and theirs.dtype == ours.dtype
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()))


def norm_lif_of(x, *, training=True, steps=4, readout=None, seed=0):
    """Result, running statistics and gradients of the kernels."""
    torch.manual_seed(seed)
    norm, offset = nn.BatchNorm2d(x.shape[1]).train(training), torch.randn(x.shape[1]).requires_grad_()
    x, gain = x.detach().requires_grad_(), torch.tensor(0.4, requires_grad=True)
    kind = fused_lif.Dynamics(gain, threshold=0.7)
    out = fused_lif.norm_lif(x, offset, norm, steps, constant=False, readout=readout, neuron=kind)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return out.detach(), *norm.buffers(), x.grad, norm.weight.grad, norm.bias.grad, gain.grad


@pytest.mark.parametrize("channels", [3, 70, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype, channels, with_threads):
    """Nor on what it was at an earlier call: to the last digit."""
    x = (1 + torch.randn(4 * 20, channels, 7, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = []
    for threads in (1, 2, 3, 7, 1):
        with_threads(threads)
        found.append(norm_lif_of(x))
    for results in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(results, found[0], strict=True))


def test_several_threads_compute_at_once(with_threads):
    inputs = [torch.randn(8, 20, 7, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]

    def compute(number):
        torch.set_num_threads(1 + number % 3)
        return norm_lif_of(inputs[number])[0]

    alone = [norm_lif_of(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(compute, range(12)))
    assert alone[0].any() and all(map(torch.equal, together, alone))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_moments_far_from_zero(offset):
    x = (torch.randn(64, 5, 7, 7, generator=torch.Generator().manual_seed(0)) + offset).to(
        memory_format=torch.channels_last
    )
    mean, variance, count = fused_lif.moments(x)
    assert count == 64 * 7 * 7
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("neuron", [LIF, FewSpikes])
@torch.no_grad()
def test_strange_currents_give_the_spikes_that_spikingjelly_gives(neuron, value, calls):
    norm, lif, x = nn.BatchNorm2d(1).eval(), neuron(), torch.full((5, 1, 1, 1), 1.5)
    x[1] = value
    found = []
    for context in (as_modules, nullcontext):
        with context(lif):
            found.append(fire(norm, lif, x, 5, bias=torch.zeros(1)).flatten().tolist())
    assert torch.equal(*map(torch.tensor, found)) if value == value or neuron is LIF else found[1][1] != found[1][1]
    assert calls


@pytest.mark.parametrize(
    ("shape", "channels", "readout", "training"),
    [
        ((7, 5, 2, 2), 5, None, False),  # not a multiple of the spike steps
        ((8, 5, 2, 2), 4, None, False),
        ((8, 5, 2, 2), 6, None, False),
        ((8, 5, 2), 5, None, False),
        ((8, 5, 2, 2), 5, 3, False),
        ((8, 5, 2, 2), 5, 5, False),
        ((1, 5, 1, 1), 5, None, True),  # one value of each channel has no variance
    ],
)
def test_what_does_not_fit_is_an_error(shape, channels, readout, training):
    norm, x, steps = nn.BatchNorm2d(channels).train(training), torch.ones(shape), 1 if training else 4
    weights = None if readout is None else torch.ones(readout)
    assert fused_lif.norm_lif(x, torch.zeros(5), norm, steps, constant=False, readout=weights) is None
    with pytest.raises((RuntimeError, ValueError)):
        fire(norm, LIF(), x, steps, bias=torch.zeros(5), readout=weights)


def test_what_the_kernels_cannot_read_is_left_to_torch():
    norm, x, offset = nn.BatchNorm2d(5), torch.randn(8, 5, 2, 2), torch.zeros(5)

    def computed(x=x, offset=offset, norm=norm, **options):
        return fused_lif.norm_lif(x, offset, norm, 4, constant=False, **options) is not None

    assert computed() and computed(dtype=torch.bfloat16) and computed(x.bfloat16()) and computed(x[..., ::2])
    assert not computed(x.to("meta")) and not computed(offset=offset.to("meta"))
    assert not computed(norm=copy.deepcopy(norm).to("meta"))
    assert not computed(readout=torch.ones(4, device="meta")) and not computed(readout=torch.ones(4).requires_grad_())
    assert not computed(x.half()) and not computed(x.double()) and not computed(norm=copy.deepcopy(norm).double())
    assert not computed(dtype=torch.float16) and not computed(dtype=torch.float64)
    assert not computed(norm=nn.SyncBatchNorm(5)), "without the other processes"
    norm.register_forward_hook(lambda norm, inputs, out: 2 * out)
    assert not computed()


@torch.no_grad()
def test_views_of_torch_that_are_not_what_lies_in_memory_are_left_to_torch():
    """A negated view, and what `torch.func.vmap` passes."""
    torch.manual_seed(0)
    layer = Firing(4, 2, 0.5).eval()
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    assert 0 < expected.mean() < 1
    assert torch.equal(layer(torch._neg_view(-x)), expected)
    both = torch.func.vmap(layer)(torch.stack((x, 2 * x)))
    assert torch.equal(both, torch.stack((expected, layer(2 * x))))


@torch.no_grad()
def test_autocast_leaves_float64_as_it_is():
    torch.manual_seed(0)
    stack = SpikingStack(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), spike_steps=4).double()
    x = torch.rand(4, 3, 8, 8).double()
    expected = stack(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(x), expected)


def test_where_torch_makes_tensors_does_not_matter():
    x = torch.randn(8, 5, 2, 2)
    expected = norm_lif_of(x)
    norm, offset = nn.BatchNorm2d(5), torch.zeros(5, requires_grad=True)
    with torch.device("meta"):
        out = fused_lif.norm_lif(x, offset, norm, 4, constant=False)
        out.sum().backward()
    assert out.device.type == norm.weight.grad.device.type == "cpu" and out.shape == expected[0].shape


def test_a_second_derivative_is_refused():
    """Rather than missing what depends on the first one."""
    norm, x = nn.BatchNorm2d(5), torch.randn(8, 5, 2, 2)
    out = fused_lif.norm_lif(x, torch.zeros(5), norm, 4, constant=False)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), norm.weight, create_graph=True)
