"""Layers of weights in whole numbers: int8 times powers of two, sums without rounding."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import event_conv
from models.kernels.event_conv import Convolution
from models.spiking import full_precision, of_neighbours
from parts import FEW_SPIKES_RANGE

UNIT = 2.0**-13
"""Currents are multiples of it, below LARGEST_CURRENT, so they are what a chip would compute in int32."""

LARGEST_CURRENT = UNIT * 2**24  # up to here, float32 carries multiples of UNIT
LARGEST_WEIGHT = 127
FINEST_SCALE = UNIT * 4  # of weights, so that a quarter of it, which a last digit brings, is a unit
LARGEST_INPUT = 128  # in its own units; above, int16 sums of two products could overflow on older processors
REAL_UNIT = 2.0**-6  # of inputs that are no spikes: tokens, timesteps, embeddings
PIXEL_LEVELS, PIXEL_RANGE = 510, 512  # a pixel less 0.5 is a multiple of 1/510, and becomes one of 1/512


def row_scales(weight: Tensor) -> Tensor:
    """Of each row of a weight `[R,...]`, the power of two `[R]` whose multiples by int8 come nearest to it."""
    rows = weight.detach().flatten(1)
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
    return _nearest(weight.detach().flatten(1), row_scales(weight)).view_as(weight)


@contextmanager
def rounded(network: nn.Module) -> Iterator[None]:
    """Context in which a network has whole weights; afterwards it has its own again.

    Gradients are those of whole weights, for its own (straight-through estimator, arXiv 1308.3432).
    """
    weights = trained_weights(network)
    own = [weight.detach().clone() for weight in weights]
    round_weights(network)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, own, strict=True):
                weight.copy_(before)


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Make all trained weights of a network whole."""
    for weight in trained_weights(network):
        weight.copy_(whole(weight))


def trained_weights(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that have rows, which are what inference in whole numbers rounds to int8."""
    return [parameter for parameter in network.parameters() if parameter.dim() > 1 and parameter.requires_grad]


def in_units(values: Tensor) -> Tensor:
    """Currents rounded to multiples of UNIT, float32."""
    return ((values.detach().double() / UNIT).round() * UNIT).float()


def _shape_of(conv: Convolution) -> dict[str, Any]:
    """What a layer of the same shape and type is made with."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names} | dict(bias=conv.bias is not None, dtype=conv.weight.dtype)


def _take_weights(layer: Convolution, other: Convolution) -> None:
    """Give a layer the weights and the bias of another, rounded."""
    layer.weight = nn.Parameter(whole(other.weight), requires_grad=False)
    if other.bias is not None:
        layer.bias = nn.Parameter(in_units(other.bias).to(other.weight.dtype), requires_grad=False)


class IntegerConv2d(nn.Conv2d):
    """A convolution with whole weights, of inputs that are multiples of `unit`; it computes in int8 where torch can.

    Elsewhere it computes in float64 and rounds, because some algorithms for convolutions are not exact. The output has
    the type of the weights. `steps` is a power of 2, see `at`.
    """

    def __init__(self, conv: nn.Conv2d, unit: float, steps: int = 1):
        super().__init__(**_shape_of(conv))
        self.unit, self.steps = unit, steps
        _take_weights(self, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[N,C,H,W]`, or counts of their unit, uint8, to currents `[N,C',H',W']`."""
        counts = x if x.dtype == torch.uint8 else x / self.unit
        small = _largest_count(self.unit) <= LARGEST_INPUT
        currents = self._convolve_int8(counts.to(torch.uint8)) if small and _has_int8(x) else self._convolve(counts)
        currents = (in_units(currents) if self.unit * FINEST_SCALE < UNIT else currents).to(self.weight.dtype)
        return currents if self.bias is None else currents + self.bias.view(-1, 1, 1)

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Without its bias at chosen positions, see `convolve_at`; inputs `[S,R,C]` are counts, uint8, or their means.

        Means are over `steps`, in floating point.
        """
        counted = x.dtype == torch.uint8
        steps = 1 if counted else self.steps
        largest = steps * _largest_count(self.unit)
        packed = _pack(self) if largest <= LARGEST_INPUT and _has_int8(x) else None
        if packed is None or packed.largest_sum * largest >= 2**24:  # float32 would round what int8 sums up to
            weight = self.weight.double().permute(0, 2, 3, 1).flatten(1)  # [C',C,3,3] -> [C',9C]
            currents = of_neighbours(lambda near: F.linear(near.double() * self.unit, weight), x, rows)
        else:
            counts = x if counted else (x * steps).to(torch.uint8)
            events = packed.convolve_events(counts, rows) if counted and self.unit == 1 else None
            multiply = partial(packed.multiply, self.unit / steps)
            currents = of_neighbours(multiply, counts, rows) if events is None else events
        return currents.to(self.weight.dtype)

    def _convolve(self, counts: Tensor) -> Tensor:
        with full_precision(counts):
            x, weight = counts.double(), self.weight.double()
            sums = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
            return (sums / FINEST_SCALE).round() * (FINEST_SCALE * self.unit)  # the multiples that they are, if exact

    def _convolve_int8(self, counts: Tensor) -> Tensor:
        packed, counts = _pack(self), counts.contiguous(memory_format=torch.channels_last)
        if self.unit == 1 and packed.tiles is not None:  # spikes: few, perhaps
            currents = event_conv.convolve_whole(self, counts, packed.tiles, packed.scales)
            if currents is not None:
                return currents
        return packed.convolve(self.unit, counts)


PLAIN: tuple = (1.0, 0, torch.float32, "none", [], "")
"""How oneDNN returns sums: neither scaled nor shifted."""


class Packed:
    """The weights of a layer, int8 with `scales [C']`, as the kernels read them; each form is made when needed.

    Inputs are counts, uint8, of a unit.
    """

    def __init__(self, layer: IntegerConv2d):
        self.scales = row_scales(layer.weight).float()
        self.weight = (layer.weight / self.scales.view(-1, 1, 1, 1)).to(torch.int8)
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int64)
        self.modes = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
        self.largest_sum = int(self.weight.int().abs().sum((1, 2, 3)).max())  # of as many ones

    @cached_property
    def tiles(self) -> Tensor | None:
        """For the sums of events; None without kernels."""
        return event_conv.pack_whole(self.weight)

    @cached_property
    def _of_convolution(self) -> Tensor:
        return cast(Tensor, torch.ops.onednn.qconv_prepack(self.weight, self.scales, 1.0, 0, *self.modes, None))

    @cached_property
    def _of_product(self) -> Tensor:
        rows = self.weight.permute(0, 2, 3, 1).flatten(1)  # [C',C,3,3] -> [C',9C]
        return cast(Tensor, torch.ops.onednn.qlinear_prepack(rows, None))

    def convolve(self, unit: float, counts: Tensor) -> Tensor:
        """The convolution, `[N,C,H,W]` to `[N,C',H',W']`, float32."""
        weight = self._of_convolution, self.scales * unit, self.zeros, None
        return cast(Tensor, torch.ops.onednn.qconv2d_pointwise(counts, 1.0, 0, *weight, *self.modes, *PLAIN))

    def convolve_events(self, spikes: Tensor, rows: Tensor) -> Tensor | None:
        """The convolution of spikes, of unit 1, at chosen positions, see `convolve_at`; None if there are too many."""
        if self.tiles is None:
            return None
        events = event_conv.find_events(spikes.contiguous(), rows.long())
        sizes = len(spikes), len(rows)
        return (
            None if events is None else events.convolve(self.tiles, len(self.scales), self.scales).unflatten(0, sizes)
        )

    def multiply(self, unit: float, near: Tensor) -> Tensor:
        """The product with gathered neighbours, `[...,9C]` to `[...,C']`, float32."""
        weight = self._of_product, self.scales * unit, self.zeros, None
        products = torch.ops.onednn.qlinear_pointwise(near.flatten(0, -2), 1.0, 0, *weight, *PLAIN)
        return cast(Tensor, products).unflatten(0, near.shape[:-1])


_packed: WeakKeyDictionary[IntegerConv2d, tuple[tuple[int, int], Packed]] = WeakKeyDictionary()


def _pack(layer: IntegerConv2d) -> Packed:
    """The weights of a layer as the kernels read them; made once for each version of them."""
    version = layer.weight._version, layer.weight.data_ptr()
    if layer not in _packed or _packed[layer][0] != version:
        _packed[layer] = version, Packed(layer)
    return _packed[layer][1]


class IntegerPixelConv2d(IntegerConv2d):
    """The convolution that reads pixels, `[0,1]` less 0.5."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv, 1 / PIXEL_RANGE)
        self.weight = nn.Parameter(whole(conv.weight * (PIXEL_RANGE / PIXEL_LEVELS)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """See IntegerConv2d."""
        return super().forward((x * PIXEL_LEVELS).round() / PIXEL_RANGE)


class IntegerConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with whole weights, of numbers, or of counts of `unit`, uint8.

    It computes in float32 where its sums are exact in that, and otherwise in float64.
    """

    def __init__(self, conv: nn.ConvTranspose2d, unit: float):
        super().__init__(**_shape_of(conv), output_padding=cast(tuple[int, int], conv.output_padding))
        self.unit = unit
        _take_weights(self, conv)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See torch."""
        modes = (self.stride, cast(tuple[int, int], self.padding), self.output_padding, self.groups, self.dilation)
        most = FEW_SPIKES_RANGE * float(self.weight.abs().sum((0, 2, 3)).max())  # no sum can surpass it
        exact = _has_int8(x) and most < 2**24 * FINEST_SCALE * self.unit
        with full_precision(x):
            numbers = x.to(torch.float32 if exact else torch.float64)
            numbers = numbers * self.unit if x.dtype == torch.uint8 and self.unit != 1 else numbers
            currents = F.conv_transpose2d(numbers, self.weight.to(numbers.dtype), None, *modes)
        currents = (currents if exact and self.unit == 1 else in_units(currents)).to(self.weight.dtype)
        return currents if self.bias is None else currents + self.bias.view(-1, 1, 1)


def _largest_count(unit: float) -> int:
    """The most that neurons can send, in units."""
    return max(1, round(FEW_SPIKES_RANGE / unit))


def _has_int8(x: Tensor) -> bool:
    """Whether torch has convolutions of int8 for the processor that a tensor is on."""
    return x.device.type == "cpu" and platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()
