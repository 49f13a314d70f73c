"""Spiking building blocks shared by the networks: stacks of convolution, batch norm and LIF, and readouts.

Tensors over spike steps are `[S,N,C,H,W]`. A tensor without the first axis, `[N,C,H,W]`, is an input that is the same
at every spike step (direct coding).

There are two backends, which compute the same function. "reference" follows the equations literally: it calls every
layer as a module at every spike step, with SpikingJelly's neuron. "fast" avoids redundant work: a constant input is
convolved once, a linear head is applied to the sum over the spike steps, and batch norm and LIF are fused on the CPU if
there is a C++ compiler. "fast" is the default; `use_backend` chooses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from models import event_conv, fused_lif
from models.event_conv import Convolution

MEMBRANE_DECAY = 0.8
SURROGATE = surrogate.ATan(2.0)
BACKENDS = ("fast", "reference")

_backend = ContextVar("backend", default="fast")  # each thread has its own


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which this thread's spiking networks compute with the backend `name`.

    Other threads do not see it, nor does one that is started inside. Raises ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    before = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(before)


def is_reference() -> bool:
    """Whether this thread has chosen the reference backend."""
    return _backend.get() == "reference"


def full_precision(x: Tensor) -> torch.autocast:
    """Context that disables autocast on the device of `x`, for sums and distances that need full precision."""
    return torch.autocast(x.device.type, enabled=False)


class LIF(neuron.LIFNode):
    """SpikingJelly's multi-step LIF as the paper uses it: tau 2, threshold 1, hard reset to 0, ATan surrogate.

    `H = V + (X - V) / 2`, spike `[H >= 1]`, `V = H (1 - spike)`; other values of its attributes are obeyed, but only
    these are fast: see `is_papers_neuron`. Starts from rest at every call. The membrane potential
    is at least float32, even if `X` is bfloat16: SpikingJelly's fused kernels expect that, whereas the state that a
    SpikingJelly neuron keeps by itself would have the type of `X`.
    """

    def __init__(self):
        super().__init__(tau=2.0, surrogate_function=SURROGATE, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        """Input currents `[S,...]` to spikes `[S,...]`."""
        rest = torch.full_like(x[0], self.v_reset or 0.0, dtype=torch.promote_types(x.dtype, torch.float32))
        parameters = (self.tau, self.decay_input, self.v_threshold, self.v_reset, self.surrogate_function)
        modes = (self.detach_reset, self.store_v_seq)
        spikes, _, voltages = functional.lif_multi_step(x, rest, *parameters, *modes)
        if self.store_v_seq:
            self.v_seq = voltages
        return spikes


def is_papers_neuron(layer: nn.Module) -> bool:
    """Whether a neuron is what `fused_lif` computes: `LIF` with the values of the paper. Others run as they are."""
    gradient: Any = layer.surrogate_function if fused_lif.is_exactly(layer, LIF) else None
    if gradient is None or not fused_lif.is_exactly(gradient, surrogate.ATan):
        return False
    values = (layer.tau, layer.v_threshold, layer.v_reset, gradient.alpha)
    modes = (layer.decay_input, layer.detach_reset, layer.store_v_seq, gradient.spiking)
    fixed = all(isinstance(value, int | float) for value in values)  # not learned, and a reset that is hard
    return fixed and (values, modes) == ((2, 1, 0, 2), (True, False, False, True))


Layer = TypeVar("Layer", bound=nn.Module)
Block = tuple[Convolution, nn.BatchNorm2d, LIF]


def lif_step(current: Tensor, potential: Tensor | float) -> tuple[Tensor, Tensor]:
    """One spike step of `LIF`: input current and membrane potential of the same shape to spikes and the new potential.

    For networks whose next input depends on their output. At rest the potential is 0.
    """
    charged = potential + (current - potential) / 2
    spikes = SURROGATE(charged - 1)
    return spikes, charged * (1 - spikes)


def postsynaptic_potential(spikes: Tensor) -> Tensor:
    """Filter `u_i = u_(i-1) + (x_i - u_(i-1)) / 2` from 0 along the spike steps. `[S,...]` to `[S,...]`."""
    steps = torch.arange(len(spikes), device=spikes.device)
    lag = steps[:, None] - steps  # [S,S]
    impulse_response = torch.where(lag >= 0, 0.5 ** (lag.clamp_min(0) + 1.0), 0.0).to(spikes.dtype)
    with full_precision(spikes):
        return (impulse_response @ spikes.flatten(1)).view_as(spikes)


def membrane_weights(spike_steps: int, like: Tensor) -> Tensor:
    """Weights `0.8^(S-1-i)` of the membrane readout, `[S]`, with the device and float type of `like`.

    The powers are computed in float32 whatever the type, as in the release, so that results agree to the last digit.
    """
    exponents = torch.arange(spike_steps - 1, -1, -1)
    return (torch.tensor(MEMBRANE_DECAY, dtype=torch.float32) ** exponents).to(like)


def weighted_sum(weights: Tensor, spikes: Tensor) -> Tensor:
    """Sum of `weights[s] * spikes[s]`: `[S]` and `[S,...]` to `[...]`."""
    with full_precision(spikes):
        return torch.tensordot(weights, spikes.to(weights.dtype), 1)


def literal(*convolutions: nn.Module) -> bool:
    """Whether to call these layers as modules, at every spike step: on the reference backend, or if one is a subclass.

    Likewise if it has hooks or a forward of its own: it may compute anything.
    """
    own = all(fused_lif.is_exactly(conv, nn.Conv2d, nn.ConvTranspose2d) for conv in convolutions)
    return is_reference() or not own


def apply_head(head: Convolution, x: Tensor, weights: Tensor) -> Tensor:
    """Output of a convolution without neurons, summed over the spike steps with `weights [S]`: `[N,C',H',W']`.

    If `x` is the spikes `[S,N,C,H,W]`, the convolution runs at every step; if it is their weighted sum `[N,C,H,W]`, it
    runs once, which is equivalent because it is linear (its bias counts `sum(weights)` times).
    """
    if x.dim() == 5:
        return weighted_sum(weights, head(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
    with full_precision(x):
        return head(x) + (weights.sum() - 1) * bias_of(head).view(-1, 1, 1)


def norm_lif(norm: nn.BatchNorm2d, lif: LIF, x: Tensor, spike_steps: int) -> Tensor:
    """Batch norm and LIF: currents `[S*N,C,H,W]` to spikes `[S,N,C,H,W]`, in the type of the batch norm.

    In bfloat16, batch norm would round a steady current just above the threshold to just that, and silence its neuron.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if norm.weight is None else norm.weight.dtype
    with full_precision(x):
        return lif(norm(x.to(dtype)).unflatten(0, (spike_steps, -1)))


def fire(
    norm: nn.BatchNorm2d,
    lif: LIF,
    x: Tensor,
    spike_steps: int,
    *,
    bias: Tensor,
    readout: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """Bias `[C]`, batch norm, LIF: currents `[S*N,C,H,W]`, or `[N,C,H,W]` if `constant`, to spikes `[S,N,C,H,W]`.

    With `readout` weights `[S]`: to `sum_s readout[s] * spikes[s]`, `[N,C,H,W]`.
    """
    dtype = _spike_dtype(x, readout)
    if not is_reference() and is_papers_neuron(lif):
        fused = fused_lif.norm_lif(x, bias, norm, spike_steps, constant=constant, readout=readout, dtype=dtype)
        if fused is not None:
            return fused if readout is not None else fused.unflatten(0, (spike_steps, -1))
    x = x + bias.view(-1, 1, 1)  # of the type of the bias: float32, even if the currents are bfloat16
    spikes = norm_lif(norm, lif, x.repeat(spike_steps, 1, 1, 1) if constant else x, spike_steps)
    return spikes.to(dtype) if readout is None else weighted_sum(readout, spikes)


class Firing(nn.Module):
    """Batch norm and LIF: turns the real-valued currents of a residual network into spikes.

    `bias` is the initial bias of batch norm: with few spike steps, neurons must start near their threshold to learn.
    """

    def __init__(self, channels: int, spike_steps: int, bias: float):
        super().__init__()
        self.norm, self.lif = nn.BatchNorm2d(channels), LIF()
        nn.init.constant_(self.norm.bias, bias)
        self.spike_steps = spike_steps

    def forward(self, x: Tensor, readout: Tensor | None = None) -> Tensor:
        """Currents `[S,N,C,H,W]`, or `[N,C,H,W]` if they are the same at each step, to spikes `[S,N,C,H,W]`.

        With `readout` weights `[S]`: to `sum_s readout[s] * spikes[s]`, `[N,C,H,W]`.
        """
        constant, bias = x.dim() == 4, torch.zeros_like(self.norm.bias)
        x = x if constant else x.flatten(0, 1)
        return fire(self.norm, self.lif, x, self.spike_steps, bias=bias, readout=readout, constant=constant)


class SpikingStack(nn.Sequential):
    """Convolutions, each followed by batch norm and LIF; optionally ends in a convolution without either, the head.

    Parameter names are the release's: "0.weight" a convolution, "1.weight" its batch norm, "3.weight" the next
    convolution, and so on.
    """

    def __init__(self, *convolutions: Convolution, spike_steps: int, head: Convolution | None = None):
        blocks = ((conv, nn.BatchNorm2d(conv.out_channels), LIF()) for conv in convolutions)
        super().__init__(*chain.from_iterable(blocks), *([] if head is None else [head]))
        self.spike_steps = spike_steps

    @property
    def blocks(self) -> list[Block]:
        """Convolution, batch norm and LIF of each block."""
        layers = list(self)
        return [cast(Block, tuple(layers[i : i + 3])) for i in range(0, len(layers) - 2, 3)]

    @property
    def head(self) -> Convolution | None:
        """The convolution at the end, if any."""
        return cast(Convolution, self[-1]) if len(self) % 3 else None

    def forward(self, x: Tensor, readout: Tensor | None = None) -> Tensor:
        """Spikes `[S,N,C,H,W]` or constant input `[N,C,H,W]` to spikes `[S,N,C',H',W']`.

        With `readout` weights `[S]`, which a head needs: to `sum_s readout[s] * output[s]`, `[N,C',H',W']`.
        """
        *blocks, last = self.blocks
        for block in blocks:
            x = self._spikes(block, x)
        if self.head is None or readout is None:
            return self._spikes(last, x, readout)
        return apply_head(self.head, self._spikes(last, x, None if literal(self.head) else readout), readout)

    def _spikes(self, block: Block, x: Tensor, readout: Tensor | None = None) -> Tensor:
        (conv, norm, lif), constant = block, x.dim() == 4
        if literal(conv):
            x = conv((x.expand(self.spike_steps, *x.shape) if constant else x).flatten(0, 1))
            return fire(norm, lif, x, self.spike_steps, bias=x.new_zeros(x.shape[1]), readout=readout)
        if constant:
            with full_precision(x):  # tokens and timesteps are large integers, inexact in bfloat16
                x = convolve(conv, x)  # once, not at every step
        else:
            x = convolve_spikes(conv, x.flatten(0, 1))
        return fire(norm, lif, x, self.spike_steps, bias=bias_of(conv), readout=readout, constant=constant)

    @property
    def is_local(self) -> bool:
        """Whether `fire_at` computes it: one block, without batch statistics, of which each layer is local."""
        conv, norm, lif = self.blocks[0]
        fixed = fused_lif.is_exactly(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and norm.running_mean is not None
        return len(self) == 3 and is_local(conv) and fixed and not norm.training and fused_lif.is_exactly(lif, LIF)

    def fire_at(self, x: Tensor, rows: Tensor, readout: Tensor | None = None) -> Tensor:
        """The output of a stack at chosen positions, spikes `[S,P,C']`, if it `is_local`; see `convolve_at`.

        With `readout` weights `[S]`: to their weighted sum `[P,C']`.
        """
        ((conv, norm, lif),) = self.blocks
        currents = event_conv.convolve_at(conv, x, rows)
        x = convolve_at(conv, x, rows) if currents is None else currents
        x = x.flatten(0, 1)[:, :, None, None]  # [S*P,C',1,1]
        return fire(norm, lif, x, self.spike_steps, bias=bias_of(conv), readout=readout).flatten(-3)


def is_local(conv: nn.Module) -> bool:
    """Whether `convolve_at` computes a layer from the 3x3 neighbours of each position."""
    if literal(conv) or not isinstance(conv, nn.Conv2d):
        return False
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def one_hot(layer: Layer) -> Layer:
    """Mark a layer whose input is one-hot: without spikes it would be a look-up, and `metrics.energy` counts it so."""
    object.__setattr__(layer, "one_hot", True)
    return layer


def bias_of(conv: Convolution) -> Tensor:
    """The bias `[C]` of a convolution; zeros if it has none."""
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def convolve(conv: Convolution, x: Tensor) -> Tensor:
    """A convolution or transposed convolution, without its bias.

    In front of batch norm the bias cancels, so its gradient is zero, and computing that zero is slow on the CPU.
    """
    if isinstance(conv, nn.ConvTranspose2d):
        padding = cast(tuple[int, int], conv.padding)  # never a string in a transposed convolution
        modes = (conv.output_padding, conv.groups, conv.dilation)
        return F.conv_transpose2d(x, conv.weight, None, conv.stride, padding, *modes)
    return conv._conv_forward(x, conv.weight, None)  # pads as the layer does


def convolve_spikes(conv: Convolution, x: Tensor) -> Tensor:
    """`convolve` for spikes: event-driven where this is faster."""
    currents = event_conv.convolve(conv, x)
    return convolve(conv, x) if currents is None else currents


def convolve_at(conv: Convolution, x: Tensor, rows: Tensor) -> Tensor:
    """A 3x3 convolution without its bias at chosen positions: features `[S,R,C]`, `rows [P,9]` to `[S,P,C']`.

    `rows` has the indices of each position's neighbours among the R features; R stands for zero padding. A few spike
    steps are computed at a time, so that gathered neighbours are still in the cache when they are multiplied. The
    number of positions is rounded up to a multiple of 64, because oneDNN caches a bfloat16 kernel for every size it
    meets: gigabytes over some thousand images.
    """
    positions = len(rows)
    rows = F.pad(rows, (0, 0, 0, -positions % 64), value=x.shape[1])
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)  # [C',C,3,3] -> [C',9C]
    parts = F.pad(x, (0, 0, 0, 1)).split(4)
    gathered = (part.index_select(1, rows.flatten()).view(len(part), len(rows), -1) for part in parts)
    return torch.cat([F.linear(neighbours, weight)[:, :positions] for neighbours in gathered])


def _spike_dtype(x: Tensor, readout: Tensor | None) -> torch.dtype:
    """Spikes are 0 or 1, exact in the type that autocast computes the next convolution in; readouts are not."""
    return event_conv.computed_dtype(x) if readout is None else readout.dtype
