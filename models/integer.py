"""Inference in whole numbers: int8 weights, sums without rounding, neurons with whole thresholds.

Currents are multiples of UNIT below LARGEST_CURRENT, so they are what a chip would compute in int32. Here float32 or
float64 carries them, which is exact. Exact sums do not depend on their order: the same weights give the same bits on
every processor, with any number of threads.

- A row of weights is int8 times a power of two (`row_scales`).
- Batch norm and few-spikes neurons become thresholds (`IntegerNeurons`): a number says how many of them, evenly spaced,
  a current reaches.
- What is left in floating point is a function of one whole number at a time, in float64: the tanh of a pixel, and the
  probabilities of codes.
"""

import platform
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import compiled
from models.kernels.event_conv import Convolution
from models.neurons import FewSpikes
from models.spiking import Firing, full_precision, one_hot
from parts import FEW_SPIKES_RANGE

UNIT = 2.0**-13
LARGEST_CURRENT = UNIT * 2**24
LARGEST_STEP = UNIT * 2**20  # between thresholds; up to here, float32 divides by it without a wrong whole number
LARGEST_WEIGHT = 127
FINEST_SCALE = UNIT * 4  # of weights, so that a quarter of it, which a last digit brings, is a unit
LARGEST_INPUT = 128  # in its own units; above, int16 sums of two products could overflow on older processors
PIXEL_LEVELS, PIXEL_RANGE = 510, 512  # a pixel less 0.5 is a multiple of 1/510, and becomes one of 1/512


def row_scales(weight: Tensor) -> Tensor:
    """Of each row of a weight `[R,...]`, the power of two `[R]` whose multiples by int8 come nearest to it."""
    rows = weight.detach().double().flatten(1)
    most = rows.abs().amax(1).clamp_min(LARGEST_WEIGHT * FINEST_SCALE)
    mantissa, exponent = torch.frexp(most / LARGEST_WEIGHT)  # the mantissa is at least 0.5
    coarse = torch.ldexp(torch.ones_like(most), exponent - (mantissa == 0.5).int())
    fine = (coarse / 2).clamp_min(FINEST_SCALE)
    errors = [(_nearest(rows, scale) - rows).square().sum(1) for scale in (coarse, fine)]
    return torch.where(errors[1] < errors[0], fine, coarse)


def _nearest(rows: Tensor, scales: Tensor) -> Tensor:
    """The multiples of their scales, by int8, that are nearest to rows `[R,W]`."""
    scales = scales[:, None]
    return (rows / scales).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT) * scales


def whole(weight: Tensor) -> Tensor:
    """A weight `[R,...]` with each row rounded to int8 times its scale; of the same type, in which that is exact."""
    return _nearest(weight.detach().double().flatten(1), row_scales(weight)).view_as(weight).to(weight.dtype)


def in_units(values: Tensor) -> Tensor:
    """Currents rounded to multiples of UNIT, float32."""
    return ((values.detach().double() / UNIT).round() * UNIT).float()


class IntegerConv2d(nn.Conv2d):
    """A convolution with whole weights, of inputs that are multiples of `unit`; it computes in int8 where torch can.

    Elsewhere it computes in float64 and rounds, because some algorithms for convolutions are not exact. The output has
    the type of the weights.
    """

    def __init__(self, conv: nn.Conv2d, unit: float):
        modes: dict[str, Any] = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
        modes |= dict(groups=conv.groups, bias=conv.bias is not None, dtype=conv.weight.dtype)
        super().__init__(conv.in_channels, conv.out_channels, cast(tuple[int, int], conv.kernel_size), **modes)
        self.unit = unit
        self.weight = nn.Parameter(whole(conv.weight), requires_grad=False)
        if conv.bias is not None:
            self.bias = nn.Parameter(in_units(conv.bias).to(conv.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[N,C,H,W]`, or counts of their unit, uint8, to currents `[N,C',H',W']`."""
        counts = x if x.dtype == torch.uint8 else x / self.unit
        small = FEW_SPIKES_RANGE / self.unit <= LARGEST_INPUT
        currents = self._convolve_int8(counts) if small and _has_int8(x) else self._convolve(counts)
        currents = (in_units(currents) if self.unit * FINEST_SCALE < UNIT else currents).to(self.weight.dtype)
        return currents if self.bias is None else currents + self.bias.view(-1, 1, 1)

    def _convolve(self, counts: Tensor) -> Tensor:
        with full_precision(counts):
            x, weight = counts.double(), self.weight.double()
            sums = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
            return (sums / FINEST_SCALE).round() * (FINEST_SCALE * self.unit)  # the multiples that they are, if exact

    def _convolve_int8(self, counts: Tensor) -> Tensor:
        modes = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        version = (self.weight._version, self.weight.data_ptr())
        if self not in _packed or _packed[self][0] != version:
            scales = row_scales(self.weight)
            units, weight = (scales * self.unit).float(), (self.weight / scales.view(-1, 1, 1, 1)).to(torch.int8)
            made = torch.ops.onednn.qconv_prepack(weight, units, 1.0, 0, *modes, list(counts.shape))
            _packed[self] = version, made, units, torch.zeros(len(units), dtype=torch.int64)
        _, weight, units, zeros = _packed[self]
        x = counts.to(torch.uint8).contiguous(memory_format=torch.channels_last)
        plain: tuple = (1.0, 0, torch.float32, "none", [], "")  # the output is neither scaled nor shifted
        currents: Tensor = torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, weight, units, zeros, None, *modes, *plain)
        return currents


_packed: WeakKeyDictionary[IntegerConv2d, tuple] = WeakKeyDictionary()
"""The weights of layers as oneDNN keeps them, with the version that they were made of."""


class IntegerPixelConv2d(IntegerConv2d):
    """The convolution that reads pixels, `[0,1]` less 0.5."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv, 1 / PIXEL_RANGE)
        self.weight = nn.Parameter(whole(conv.weight * (PIXEL_RANGE / PIXEL_LEVELS)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """See IntegerConv2d."""
        return super().forward((x * PIXEL_LEVELS).round() / PIXEL_RANGE)


class IntegerConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with whole weights of a one-hot input, which picks a row of them."""

    def __init__(self, conv: nn.ConvTranspose2d):
        modes: dict[str, Any] = dict(stride=conv.stride, padding=conv.padding, bias=False)
        super().__init__(conv.in_channels, conv.out_channels, cast(tuple[int, int], conv.kernel_size), **modes)
        self.weight = nn.Parameter(whole(conv.weight), requires_grad=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See torch."""
        with full_precision(x):
            return in_units(super().forward(x, output_size))


class IntegerNeurons(FewSpikes):
    """Few-spikes neurons after batch norm: a current X is answered with `floor((X + offset) / step)`, clipped.

    That is how many of the thresholds `k step - offset`, k = 1, 2, ..., it reaches: the number that is sent, in units
    of the last digit. `offset` and `step_between` are multiples of UNIT for each channel, `[C]`.
    """

    offset: Tensor
    step_between: Tensor

    def __init__(self, firing: Firing):
        norm: Any = firing.norm
        super().__init__(cast(FewSpikes, firing.lif).digits)
        gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        steps = (self.last / gain).clamp(-LARGEST_STEP, LARGEST_STEP)
        reached = (norm.bias.detach().double() - norm.running_mean.double() * gain) / self.last + 0.5  # without current
        self.register_buffer("step_between", in_units(steps))
        self.register_buffer("offset", in_units(reached * self.step_between))

    def forward(self, x: Tensor) -> Tensor:
        """Currents `[S,N,C,H,W]` to counts, uint8 of the same shape. Raises OverflowError if a current is too large."""
        counts, overflow = _count_thresholds(x.flatten(0, 1), self.offset, self.step_between, 2**self.digits - 1)
        if overflow:
            raise OverflowError(f"a current is beyond {LARGEST_CURRENT:g}: these weights need larger units")
        return counts.unflatten(0, x.shape[:2])

    def binary_spikes(self, numbers: Tensor) -> Tensor:
        """See FewSpikes; also of counts, uint8."""
        return super().binary_spikes(numbers * self.last if numbers.dtype == torch.uint8 else numbers)


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


class IntegerFiring(nn.Module):
    """What `Firing` is, in whole numbers: counts, or, where no layer follows that knows their unit, numbers."""

    def __init__(self, firing: Firing, numbers: bool = False):
        super().__init__()
        self.lif, self.spike_steps, self.numbers = IntegerNeurons(firing), firing.spike_steps, numbers

    def forward(self, x: Tensor, readout: None = None) -> Tensor:
        """See Firing; there is one spike step, and no readout."""
        counts = self.lif(x if x.dim() == 5 else x[None])
        return counts * self.lif.last if self.numbers else counts


def are_whole(weights: dict[str, Tensor]) -> bool:
    """Whether weights are those of a network in whole numbers."""
    return any(name.endswith(".step_between") for name in weights)


def in_whole_numbers(network: nn.Module) -> nn.Module:
    """A trained network of few-spikes neurons, changed to whole numbers. Raises ValueError for other neurons."""
    neurons = [layer.lif for layer in network.modules() if isinstance(layer, Firing)]
    if not neurons or not all(isinstance(neuron, FewSpikes) for neuron in neurons):
        raise ValueError("only networks of residual blocks with --neuron fs can be in whole numbers")
    last_digit = neurons[0].last
    codebook = getattr(network, "vq_layer", None)
    of_codes = last_digit if codebook is None else FEW_SPIKES_RANGE / len(codebook.embeddings.weight)
    for name, layer in list(network.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if isinstance(layer, Firing):
            setattr(network.get_submodule(parent), attribute, IntegerFiring(layer, attribute == "fire_codes"))
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            unit = of_codes if name == "decoder.embed" else last_digit
            setattr(network.get_submodule(parent), attribute, _integer_layer(layer, name, unit))
    for layer in network.modules():
        if not isinstance(layer, IntegerConv2d | IntegerConvTranspose2d):
            for own in layer.parameters(recurse=False):
                own.data = whole(own)
    return network


def _integer_layer(layer: Convolution, name: str, unit: float) -> Convolution:
    """The layer of this name in whole numbers. A head, whose output is no current, has float64 for what follows."""
    if name.endswith("head"):
        layer = layer.double()
    if isinstance(layer, nn.ConvTranspose2d):
        result: Convolution = IntegerConvTranspose2d(layer)
    else:
        result = IntegerPixelConv2d(layer) if name == "encoder.embed" else IntegerConv2d(layer, unit)
    return one_hot(result) if getattr(layer, "one_hot", False) else result


def _has_int8(x: Tensor) -> bool:
    """Whether torch has convolutions of int8 for the processor that a tensor is on."""
    return x.device.type == "cpu" and platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()
