"""Layers of weights in whole numbers: int8 times powers of two, sums without rounding."""

import platform
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import event_conv
from models.kernels.event_conv import Convolution
from models.spiking import full_precision
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
    the type of the weights.
    """

    def __init__(self, conv: nn.Conv2d, unit: float):
        super().__init__(**_shape_of(conv))
        self.unit = unit
        _take_weights(self, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[N,C,H,W]`, or counts of their unit, uint8, to currents `[N,C',H',W']`."""
        counts = x if x.dtype == torch.uint8 else x / self.unit
        small = FEW_SPIKES_RANGE / self.unit <= LARGEST_INPUT
        currents = self._convolve_int8(counts.to(torch.uint8)) if small and _has_int8(x) else self._convolve(counts)
        currents = (in_units(currents) if self.unit * FINEST_SCALE < UNIT else currents).to(self.weight.dtype)
        return currents if self.bias is None else currents + self.bias.view(-1, 1, 1)

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Without its bias at chosen positions, see `convolve_at`; inputs `[S,R,C]` may be counts, uint8."""
        packed = self._pack() if x.dtype == torch.uint8 and self.unit == 1 and _has_int8(x) else None
        if packed is not None and packed.tiles is not None:
            events = event_conv.find_events(x.contiguous(), rows.long())
            if events is not None:
                return events.convolve(packed.tiles, self.out_channels, packed.units).unflatten(0, (len(x), len(rows)))
        numbers = F.pad(x.double() * (self.unit if x.dtype == torch.uint8 else 1), (0, 0, 0, 1))
        weight = self.weight.double().permute(0, 2, 3, 1).flatten(1)  # [C',C,3,3] -> [C',9C]
        return F.linear(numbers[:, rows].flatten(2), weight).to(self.weight.dtype)

    def _convolve(self, counts: Tensor) -> Tensor:
        with full_precision(counts):
            x, weight = counts.double(), self.weight.double()
            sums = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
            return (sums / FINEST_SCALE).round() * (FINEST_SCALE * self.unit)  # the multiples that they are, if exact

    def _convolve_int8(self, counts: Tensor) -> Tensor:
        packed, counts = self._pack(), counts.contiguous(memory_format=torch.channels_last)
        if self.unit == 1 and packed.tiles is not None:  # spikes: few, perhaps
            currents = event_conv.convolve_whole(self, counts, packed.tiles, packed.units)
            if currents is not None:
                return currents
        plain: tuple = (1.0, 0, torch.float32, "none", [], "")  # the output is neither scaled nor shifted
        weight = (packed.weight, packed.units, packed.zeros)
        return cast(Tensor, torch.ops.onednn.qconv2d_pointwise(counts, 1.0, 0, *weight, None, *self._modes, *plain))

    @property
    def _modes(self) -> tuple:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def _pack(self) -> "Packed":
        """The weights as the kernels read them; made once for each version of them."""
        version = (self.weight._version, self.weight.data_ptr())
        if self not in _packed or _packed[self].version != version:
            scales = row_scales(self.weight)
            units, weight = (scales * self.unit).float(), (self.weight / scales.view(-1, 1, 1, 1)).to(torch.int8)
            made = torch.ops.onednn.qconv_prepack(weight, units, 1.0, 0, *self._modes, None)
            zeros, tiles = torch.zeros(len(units), dtype=torch.int64), event_conv.pack_whole(weight)
            _packed[self] = Packed(version, made, units, zeros, tiles)
        return _packed[self]


class Packed(NamedTuple):
    """Weights of a `version`: as oneDNN keeps them, with the units of their sums and zeros; and as tiles of events."""

    version: tuple[int, int]
    weight: Tensor
    units: Tensor
    zeros: Tensor
    tiles: Tensor | None


_packed: WeakKeyDictionary[IntegerConv2d, Packed] = WeakKeyDictionary()


class IntegerPixelConv2d(IntegerConv2d):
    """The convolution that reads pixels, `[0,1]` less 0.5."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv, 1 / PIXEL_RANGE)
        self.weight = nn.Parameter(whole(conv.weight * (PIXEL_RANGE / PIXEL_LEVELS)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """See IntegerConv2d."""
        return super().forward((x * PIXEL_LEVELS).round() / PIXEL_RANGE)


class IntegerConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with whole weights; it computes in float64, where its sums are exact.

    Inputs are numbers, or counts of `unit`, uint8.
    """

    def __init__(self, conv: nn.ConvTranspose2d, unit: float):
        super().__init__(**_shape_of(conv), output_padding=cast(tuple[int, int], conv.output_padding))
        self.unit = unit
        _take_weights(self, conv)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See torch."""
        modes = (self.stride, cast(tuple[int, int], self.padding), self.output_padding, self.groups, self.dilation)
        with full_precision(x):
            numbers = x.double() * self.unit if x.dtype == torch.uint8 else x.double()
            currents = in_units(F.conv_transpose2d(numbers, self.weight.double(), None, *modes))
        currents = currents.to(self.weight.dtype)
        return currents if self.bias is None else currents + self.bias.view(-1, 1, 1)


def _has_int8(x: Tensor) -> bool:
    """Whether torch has convolutions of int8 for the processor that a tensor is on."""
    return x.device.type == "cpu" and platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()
