"""Neurons in whole numbers, with the batch norm before them: thresholds for currents, one for each channel."""

from typing import cast

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from models.integer_layers import LARGEST_CURRENT, UNIT, in_units
from models.kernels import compiled
from models.kernels.fused_lif import Dynamics
from models.neurons import FewSpikes, FromRest, dynamics_of

LARGEST_STEP = UNIT * 2**20  # between thresholds; up to here, float32 divides by it without a wrong whole number
LARGEST_POTENTIAL = 2**30  # in units; potentials saturate there
LARGEST_THRESHOLD, LARGEST_OFFSET = UNIT * 2**25, UNIT * 2**28  # of a neuron that hardly receives anything
LARGEST = {torch.float32: LARGEST_CURRENT, torch.float64: UNIT * 2**26}
"""Currents of LIF and IF neurons are below it."""


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The gain and the shift of batch norm in evaluation mode, float64 `[C]`: `x` becomes `gain x + shift`."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = norm.weight.detach().double() / (variance + norm.eps).sqrt()
    return gain, norm.bias.detach().double() - mean * gain


class IntegerFewSpikes(FewSpikes):
    """Few-spikes neurons after batch norm: a current X is answered with `floor((X + offset) / step)`, clipped.

    That is how many of the thresholds `k step - offset`, k = 1, 2, ..., it reaches: the number that is sent, in units
    of the last digit. `offset` and `step_between` are multiples of UNIT for each channel, `[C]`.
    """

    offset: Tensor
    step_between: Tensor

    def __init__(self, norm: nn.BatchNorm2d, layer: FewSpikes):
        super().__init__(layer.digits)
        gain, shift = affine(norm)
        self.register_buffer("step_between", in_units((self.last / gain).clamp(-LARGEST_STEP, LARGEST_STEP)))
        self.register_buffer("offset", in_units((shift / self.last + 0.5) * self.step_between))

    def forward(self, x: Tensor, spike_steps: int = 1) -> Tensor:
        """Currents `[S,N,C,H,W]`, or `[N,C,H,W]` if they are the same at each step, to counts, uint8 `[S,N,C,H,W]`.

        Raises OverflowError if a current is too large.
        """
        x = x if x.dim() == 5 else x.expand(spike_steps, *x.shape)
        counts, overflow = _count_thresholds(x.flatten(0, 1), self.offset, self.step_between, 2**self.digits - 1)
        _check(overflow)
        return counts.unflatten(0, x.shape[:2])

    def binary_spikes(self, numbers: Tensor) -> Tensor:
        """See FewSpikes; also of counts, uint8."""
        return super().binary_spikes(numbers * self.last if numbers.dtype == torch.uint8 else numbers)


class IntegerLIF(neuron.SimpleBaseNode):
    """LIF or IF neurons after batch norm. Potentials are int32, in UNITs divided by batch norm's gain.

    A current X changes the potential V to `V + ((X + offset - V) >> shift)`, or, if it does not leak, to
    `V + X + offset`; a spike is `V >= threshold`, and V is then 0. Where the gain is negative, so is the threshold, and
    X is taken with the other sign. `offset` and `threshold` are multiples of UNIT for each channel, `[C]`. Raises
    ValueError for another neuron: one without a hard reset to 0, or whose time constant is not a power of 2.
    """

    offset: Tensor
    threshold: Tensor

    def __init__(self, norm: nn.BatchNorm2d, layer: FromRest):
        super().__init__(step_mode="m")
        dynamics = dynamics_of(layer)
        if not isinstance(dynamics, Dynamics) or isinstance(dynamics.gain, Tensor):
            raise ValueError(f"a layer of {type(layer).__name__} neurons cannot be in whole numbers")
        mantissa, exponent = torch.frexp(torch.tensor(dynamics.gain, dtype=torch.float64))
        if mantissa != 0.5 or exponent > 1:
            raise ValueError(
                f"a time constant of {1 / dynamics.gain:g} cannot be in whole numbers: it is no power of 2"
            )
        self.shift, self.leaks = 1 - int(exponent), bool(dynamics.leak)
        gain, shift = affine(norm)
        gain = gain.abs().clamp_min(dynamics.threshold / LARGEST_THRESHOLD).copysign(gain)
        self.register_buffer("threshold", in_units(dynamics.threshold / gain))
        self.register_buffer("offset", in_units((shift / gain.abs()).clamp(-LARGEST_OFFSET, LARGEST_OFFSET)))

    def forward(self, x: Tensor, spike_steps: int) -> Tensor:
        """Currents `[S,N,C,H,W]`, or `[N,C,H,W]` if they are the same at each step, to spikes uint8 `[S,N,C,H,W]`.

        Raises OverflowError if a current is too large.
        """
        spikes, overflow = _integrate(x, spike_steps, self)
        _check(overflow)
        return spikes


def _check(overflow: bool) -> None:
    if overflow:
        raise OverflowError("a current is too large for 24 bits: these weights need larger units")


def _count_thresholds(x: Tensor, offset: Tensor, step: Tensor, most: int) -> tuple[Tensor, bool]:
    """Counts uint8 `[N,C,H,W]` of the thresholds that currents reach, and whether one is beyond LARGEST_CURRENT."""
    offset, step, kernel = offset.to(x.dtype), step.to(x.dtype), f"count_thresholds_{compiled.name_of(x.dtype)}"
    if compiled.readable(x) and compiled.has(kernel):
        x = x.contiguous(memory_format=torch.channels_last)
        counts = torch.empty_like(x, dtype=torch.uint8)
        sizes = (x.numel() // x.shape[1], x.shape[1], most, int(LARGEST_CURRENT))
        return counts, bool(compiled.call(kernel, x, offset, step, *sizes, counts))
    x = x + offset.view(-1, 1, 1)
    beyond = bool((x.abs() >= LARGEST_CURRENT).any())
    return (x / step.view(-1, 1, 1)).floor().clamp(0, most).to(torch.uint8), beyond


def _integrate(x: Tensor, spike_steps: int, layer: IntegerLIF) -> tuple[Tensor, bool]:
    """Spikes uint8 `[S,N,C,H,W]` of currents, and whether one is too large; see IntegerLIF."""
    constant, channels = x.dim() == 4, x.shape[-3]
    offset, threshold = ((values / UNIT).int() for values in (layer.offset, layer.threshold))
    kernel = f"integrate_{compiled.name_of(x.dtype)}"
    if compiled.readable(x) and compiled.has(kernel):
        x = (x if constant else x.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
        samples = len(x) if constant else len(x) // spike_steps
        shape = (spike_steps * samples, *x.shape[1:])
        spikes = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        sizes = (spike_steps, samples * x.shape[2:].numel(), channels, constant, layer.shift, layer.leaks)
        limits = (round(1 / UNIT), round(LARGEST[x.dtype] / UNIT), LARGEST_POTENTIAL)
        overflow = bool(compiled.call(kernel, x, offset, threshold, *sizes, *limits, spikes))
        return spikes.unflatten(0, (spike_steps, samples)), overflow
    beyond = not bool((x.abs() < LARGEST[x.dtype]).all())
    sign, offset, threshold = (v.view(-1, 1, 1) for v in (threshold.sign(), offset, threshold.abs()))
    currents = (x / UNIT).int() * sign + offset
    potential, sent = torch.zeros((), dtype=torch.int32), []
    for step in range(spike_steps):
        change = (currents if constant else currents[step]) - (potential if layer.leaks else 0)
        potential = (potential + (change >> layer.shift)).clamp_min(-LARGEST_POTENTIAL)
        fired = potential >= threshold
        potential = potential.masked_fill(fired, 0)
        sent.append(fired.to(torch.uint8))
    return torch.stack(sent), beyond
