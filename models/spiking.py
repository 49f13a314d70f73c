"""Spiking building blocks shared by the networks: stacks of convolution, batch norm and neurons, and readouts.

Tensors over spike steps are `[S,N,C,H,W]`. A tensor without the first axis, `[N,C,H,W]`, is an input that is the same
at every spike step (direct coding).

What is computed is what `models/reference.py` computes literally, without redundant work: a constant input is convolved
once, a linear head is applied to the sum over the spike steps, and batch norm and neurons that the kernels compute
(`neurons.dynamics_of`) are fused on the CPU if there is a C++ compiler. A layer that may compute something else is
called as a module, at every spike step (`literal`).
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import chain
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import event_conv, fused_lif
from models.kernels.compiled import is_exactly
from models.kernels.event_conv import Convolution
from models.neurons import LIF, OWN, FromRest, Neuron, dynamics_of
from parts import FILTER_TAU, MEMBRANE_DECAY, V_THRESHOLD


def full_precision(x: Tensor) -> torch.autocast:
    """Context that disables autocast on the device of `x`, for sums and distances that need full precision."""
    return torch.autocast(x.device.type, enabled=False)


Layer = TypeVar("Layer", bound=nn.Module)
Block = tuple[Convolution, nn.BatchNorm2d, FromRest]


def postsynaptic_potential(spikes: Tensor) -> Tensor:
    """Filter `u_i = u_(i-1) + (x_i - u_(i-1)) / tau`, tau 2, from 0 along the spike steps. `[S,...]` to `[S,...]`."""
    steps = torch.arange(len(spikes), device=spikes.device)
    lag = steps[:, None] - steps  # [S,S]
    decay = 1 - 1 / FILTER_TAU
    impulse_response = torch.where(lag >= 0, decay ** lag.clamp_min(0).float() / FILTER_TAU, 0.0).to(spikes.dtype)
    with full_precision(spikes):
        return (impulse_response @ spikes.flatten(1)).view_as(spikes)


def membrane_weights(spike_steps: int, like: Tensor) -> Tensor:
    """Weights `0.8^(S-1-i)` of the membrane readout, `[S]`, with the device and float type of `like`.

    The powers are computed in float32 whatever the type, as in the release, so that results agree to the last digit.
    """
    exponents = torch.arange(spike_steps - 1, -1, -1)
    return (torch.tensor(MEMBRANE_DECAY, dtype=torch.float32) ** exponents).to(like)


def mean_weights(spike_steps: int, like: Tensor) -> Tensor:
    """Weights `1/S` of a mean over the spike steps, `[S]`, with the device and float type of `like`."""
    return torch.full((spike_steps,), 1 / spike_steps, dtype=like.dtype, device=like.device)


def weighted_sum(weights: Tensor, spikes: Tensor) -> Tensor:
    """Sum of `weights[s] * spikes[s]`: `[S]` and `[S,...]` to `[...]`."""
    with full_precision(spikes):
        return torch.tensordot(weights, spikes.to(weights.dtype), 1)


def sum_in_order(weights: Tensor, values: Tensor) -> Tensor:
    """The same, rounded alike on every processor: one after another, or, with equal weights, of exact sums."""
    values = values.to(weights.dtype)
    if bool((weights == weights[0]).all()):
        return weights[0] * values.sum(0)
    return reduce(torch.add, map(torch.mul, weights, values))


def literal(*convolutions: nn.Module) -> bool:
    """Whether to call these layers as modules, at every spike step: if one is a subclass, it may compute anything.

    Likewise if it has hooks or a forward of its own.
    """
    return not all(is_exactly(conv, nn.Conv2d, nn.ConvTranspose2d) for conv in convolutions)


def apply_head(head: Convolution, spikes: Callable[[Tensor | None], Tensor], weights: Tensor) -> Tensor:
    """Output of a convolution without neurons, summed over the spike steps with `weights [S]`: `[N,C',H',W']`.

    `spikes` maps these weights to the weighted sum of its input, `[N,C,H,W]`, and None to the spikes `[S,N,C,H,W]`. One
    convolution of the sum is equivalent because it is linear (its bias counts `sum(weights)` times).
    """
    if literal(head):
        x = spikes(None)
        return sum_in_order(weights, head(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
    x = spikes(weights)
    with full_precision(x):
        return head(x) + (weights.sum() - 1) * bias_of(head).view(-1, 1, 1)


def norm_fire(norm: nn.BatchNorm2d, neuron: FromRest, x: Tensor, spike_steps: int) -> Tensor:
    """Batch norm and neurons: currents `[S*N,C,H,W]` to spikes `[S,N,C,H,W]`, in the type of the batch norm.

    In bfloat16, batch norm would round a steady current just above the threshold to just that, and silence its neuron.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if norm.weight is None else norm.weight.dtype
    with full_precision(x):
        return neuron(norm(x.to(dtype)).unflatten(0, (spike_steps, -1)))


def fire(
    norm: nn.BatchNorm2d,
    neuron: FromRest,
    x: Tensor,
    spike_steps: int,
    *,
    bias: Tensor,
    readout: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """Bias `[C]`, batch norm, neurons: currents `[S*N,C,H,W]`, or `[N,C,H,W]` if `constant`, to spikes `[S,N,C,H,W]`.

    With `readout` weights `[S]`: to `sum_s readout[s] * spikes[s]`, `[N,C,H,W]`.
    """
    dtype = _spike_dtype(x, readout)
    dynamics = dynamics_of(neuron)
    if dynamics is not None:
        modes = dict(constant=constant, readout=readout, dtype=dtype)
        fused = fused_lif.norm_lif(x, bias, norm, spike_steps, neuron=dynamics, **modes)
        if fused is not None:
            return fused if readout is not None else fused.unflatten(0, (spike_steps, -1))
    x = x + bias.view(-1, 1, 1)  # of the type of the bias: float32, even if the currents are bfloat16
    spikes = norm_fire(norm, neuron, x.repeat(spike_steps, 1, 1, 1) if constant else x, spike_steps)
    return spikes.to(dtype) if readout is None else weighted_sum(readout, spikes)


THRESHOLD_BIAS = 1.0  # initial bias of batch norm, in thresholds; the paper's neuron at rest fires at a current of 2
BRANCH_SCALE = 0.3  # scale of the initial weights at the end of each residual branch


def over_steps(conv: Convolution, spikes: Tensor) -> Tensor:
    """A convolution, as a module, at each spike step: `[S,N,C,H,W]` to currents `[S,N,C',H',W']`."""
    return conv(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])


class Firing(nn.Module):
    """Batch norm and neurons: turns the real-valued currents of a residual network into spikes.

    `bias` is the initial bias of batch norm, in units of the threshold: with few spike steps, neurons must start near
    their threshold to learn.
    """

    def __init__(self, channels: int, spike_steps: int, bias: float, neuron: Neuron = LIF):
        super().__init__()
        self.norm, self.lif = nn.BatchNorm2d(channels), neuron()
        nn.init.constant_(self.norm.bias, bias * getattr(self.lif, "v_threshold", V_THRESHOLD))
        self.spike_steps = spike_steps

    def forward(self, x: Tensor, readout: Tensor | None = None) -> Tensor:
        """Currents `[S,N,C,H,W]`, or `[N,C,H,W]` if they are the same at each step, to spikes `[S,N,C,H,W]`.

        With `readout` weights `[S]`: to `sum_s readout[s] * spikes[s]`, `[N,C,H,W]`.
        """
        constant, bias = x.dim() == 4, torch.zeros_like(self.norm.bias)
        x = x if constant else x.flatten(0, 1)
        return fire(self.norm, self.lif, x, self.spike_steps, bias=bias, readout=readout, constant=constant)


class SpikingStack(nn.Sequential):
    """Convolutions, each followed by batch norm and neurons; optionally ends in a convolution without either, the head.

    Parameter names are the release's: "0.weight" a convolution, "1.weight" its batch norm, "3.weight" the next
    convolution, and so on.
    """

    def __init__(
        self, *convolutions: Convolution, spike_steps: int, head: Convolution | None = None, neuron: Neuron = LIF
    ):
        blocks = ((conv, nn.BatchNorm2d(conv.out_channels), neuron()) for conv in convolutions)
        super().__init__(*chain.from_iterable(blocks), *([] if head is None else [head]))
        self.spike_steps = spike_steps

    @property
    def blocks(self) -> list[Block]:
        """Convolution, batch norm and neurons of each block."""
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
        return apply_head(self.head, partial(self._spikes, last, x), readout)

    def _spikes(self, block: Block, x: Tensor, readout: Tensor | None = None) -> Tensor:
        (conv, norm, neuron), constant = block, x.dim() == 4
        if literal(conv):
            x = conv((x.expand(self.spike_steps, *x.shape) if constant else x).flatten(0, 1))
            return fire(norm, neuron, x, self.spike_steps, bias=x.new_zeros(x.shape[1]), readout=readout)
        if constant:
            with full_precision(x):  # tokens and timesteps are large integers, inexact in bfloat16
                x = convolve(conv, x)  # once, not at every step
        else:
            x = convolve_spikes(conv, x.flatten(0, 1))
        return fire(norm, neuron, x, self.spike_steps, bias=bias_of(conv), readout=readout, constant=constant)

    @property
    def is_local(self) -> bool:
        """Whether `fire_at` computes it: one block, without batch statistics, of which each layer is local."""
        conv, norm, neuron = self.blocks[0]
        fixed = is_exactly(norm, nn.BatchNorm2d, nn.SyncBatchNorm) and norm.running_mean is not None
        return len(self) == 3 and is_local(conv) and fixed and not norm.training and is_exactly(neuron, *OWN)

    def fire_at(self, x: Tensor, rows: Tensor, readout: Tensor | None = None) -> Tensor:
        """The output of a stack at chosen positions, spikes `[S,P,C']`, if it `is_local`; see `convolve_at`.

        With `readout` weights `[S]`: to their weighted sum `[P,C']`.
        """
        ((conv, norm, neuron),) = self.blocks
        currents = event_conv.convolve_at(conv, x, rows)
        x = convolve_at(conv, x, rows) if currents is None else currents
        x = x.flatten(0, 1)[:, :, None, None]  # [S*P,C',1,1]
        return fire(norm, neuron, x, self.spike_steps, bias=bias_of(conv), readout=readout).flatten(-3)


def is_local(conv: nn.Module) -> bool:
    """Whether `convolve_at` computes a layer from the 3x3 neighbours of each position."""
    if not isinstance(conv, nn.Conv2d) or not is_exactly(conv, type(conv) if hasattr(conv, "at") else nn.Conv2d):
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

    `rows` has the indices of each position's neighbours among the R features; R stands for zero padding. A layer in
    whole numbers has a method `at` instead.
    """
    own: Callable[[Tensor, Tensor], Tensor] | None = getattr(conv, "at", None)
    if own is not None:
        return own(x, rows)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)  # [C',C,3,3] -> [C',9C]
    return of_neighbours(partial(F.linear, weight=weight), x, rows)


def of_neighbours(multiply: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """The product `multiply`, `[s,P,9C]` to `[s,P,C']`, of gathered neighbours: `[S,P,C']`; see `convolve_at`.

    A few spike steps are computed at a time, so that gathered neighbours are still in the cache when they are
    multiplied. The number of positions is rounded up to a multiple of 64, because oneDNN caches a kernel for every size
    it meets: gigabytes over some thousand images.
    """
    positions = len(rows)
    rows = F.pad(rows, (0, 0, 0, -positions % 64), value=x.shape[1])
    parts = F.pad(x, (0, 0, 0, 1)).split(4)
    gathered = (part.index_select(1, rows.flatten()).view(len(part), len(rows), -1) for part in parts)
    return torch.cat([multiply(neighbours)[:, :positions] for neighbours in gathered])


def _spike_dtype(x: Tensor, readout: Tensor | None) -> torch.dtype:
    """Spikes are 0 or 1, exact in the type that autocast computes the next convolution in; readouts are not."""
    return event_conv.computed_dtype(x) if readout is None else readout.dtype
