"""Event-driven convolutions on the CPU: they add up the weights of the inputs that fired and skip the rest.

In the trained denoiser 3 to 9 % of a convolution's inputs are spikes; a dense convolution multiplies zeros for the
rest. If the share of spikes is small enough, `event_conv.cpp` computes the layer and its weight gradient from a list of
the spikes. The gradient with respect to the spikes is not sparse and stays dense. Results differ from those of dense
convolutions by rounding alone and do not depend on the number of threads. What is no such convolution of spikes is left
to torch: `convolve` and `convolve_at` return None.
"""

import functools
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.kernels.compiled import call, check_first_derivative, has, is_exactly, name_of, readable

TILE = 64  # columns, as in event_conv.cpp
NARROWEST = 64  # input and output channels; in narrower layers, listing the spikes costs more than it saves
LARGEST_SHARE = {
    torch.bfloat16: 0.06 if torch.cpu._is_amx_tile_supported() else 0.2,  # AMX makes dense products five times faster
    torch.float32: 0.2,
    torch.float64: 0.2,
    torch.uint8: 0.1,
}
"""Share of spikes up to which events are faster: constants, so that runs are reproducible; see docs/performance.md."""


class Events:
    """For each of P outputs in each of G grids, the list of the spikes that it depends on.

    Spikes are `[G,R,C]`; `table [P,K]` has the indices of each output's K neighbours among the R positions, where R
    stands for zero padding. A spike in channel c of neighbour k has the number k C + c, the row of its weights.
    """

    def __init__(self, spikes: Tensor, starts: Tensor, table: Tensor):
        grids, rows, channels = spikes.shape
        self.outputs, self.width = grids * len(table), table.shape[1] * channels
        fired = starts.new_empty(int(starts[-1]), dtype=torch.int32)
        call(f"event_list_{name_of(spikes.dtype)}", spikes, starts, grids * rows, channels, fired)
        sizes = (grids, rows, *table.shape, channels)
        self.offsets = starts.new_empty(self.outputs + 1)
        call("event_gather", starts, fired, table, *sizes, self.offsets, None)
        self.numbers = fired.new_empty(int(self.offsets[-1]))
        call("event_gather", starts, fired, table, *sizes, self.offsets, self.numbers)

    def convolve(self, tiles: Tensor, channels: int, units: Tensor | None = None) -> Tensor:
        """Sum of the rows of weights `tiles` of each output's spikes, see `pack`: `[G*P,C']`.

        Weights of int8 have `units [C']`, float32, and so does their sum.
        """
        out = tiles.new_empty(self.outputs, channels, dtype=tiles.dtype if units is None else units.dtype)
        sizes = (self.outputs, self.width, channels)
        call(f"event_forward_{name_of(tiles.dtype)}", self.offsets, self.numbers, tiles, units, *sizes, out)
        return out

    def weight_gradient(self, grad: Tensor) -> Tensor | None:
        """Gradient `[K*C,C']` of the rows of weights, at least float32, given that of the outputs, `[G*P,C']`.

        None if the latter is not finite.
        """
        if not _finite(grad):
            return None
        dtype = torch.promote_types(grad.dtype, torch.float32)
        result = grad.new_zeros(self.width, grad.shape[1], dtype=dtype)
        sizes = (self.outputs, *result.shape)
        call(f"event_backward_{name_of(grad.dtype)}", self.offsets, self.numbers, grad, *sizes, result)
        return result


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Weights `[C',C,k,l]` as the kernels read them: in `dtype`, in tiles of columns `[ceil(C'/TILE),k*l*C,TILE]`.

    None if they are not finite.
    """
    if not _finite(weight):
        return None
    rows = weight.detach().flatten(2)  # [C',C,k*l]
    channels, inputs, taps = rows.shape
    tiles = rows.new_empty(-(-channels // TILE), taps * inputs, TILE, dtype=dtype)
    kernel = f"event_pack_{name_of(rows.dtype)}_{name_of(dtype)}"
    strides = (rows.stride(2), rows.stride(1), rows.stride(0))
    call(kernel, rows, *strides, taps, inputs, channels, tiles)
    return tiles


def pack_whole(weight: Tensor) -> Tensor | None:
    """The same for int8; None without kernels.

    Of each tile, the first half of the columns are the even bytes, which are 128 larger and have no sign.
    """
    if not has("event_pack_int8_int8"):
        return None
    tiles = pack(weight, torch.int8)
    assert tiles is not None, "whole numbers are finite"
    halves = tiles.unflatten(-1, (2, TILE // 2))
    halves[..., 0, :] ^= -128
    return halves.mT.flatten(-2)


def _finite(values: Tensor) -> bool:
    """Whether no value is infinite or none: events leave out zero times it, which is not zero."""
    return bool(values.detach().sum().isfinite())


def find_events(spikes: Tensor, table: Tensor) -> Events | None:
    """The events of contiguous spikes `[G,R,C]`; see `Events` for the table, int64.

    None if a dense convolution is faster, or if an input is neither 0 nor 1.
    """
    rows = spikes.shape[:2].numel()
    starts = table.new_empty(rows + 1)  # where the list of each row begins
    binary = call(f"event_count_{name_of(spikes.dtype)}", spikes, rows, spikes.shape[2], starts)
    if not binary or starts[-1] > LARGEST_SHARE[spikes.dtype] * spikes.numel():
        return None
    return Events(spikes, starts, table)


class Geometry(NamedTuple):
    """Where a convolution finds the neighbours of an output, as torch's functions take it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int = 1


@functools.lru_cache
def _neighbours(height: int, width: int, kernel: tuple[int, int], geometry: Geometry) -> Tensor | None:
    """The table of a convolution over a grid, `[h',w',k*l]`: torch convolves the numbers of the positions, from 1.

    For each place in the kernel there is one channel, whose kernel is 1 at that place and 0 elsewhere. None if torch
    refuses, as where the grid is too small.
    """
    numbers = torch.arange(1.0, height * width + 1, dtype=torch.float64, device="cpu").view(1, 1, height, width)
    picks = torch.eye(math.prod(kernel), dtype=torch.float64, device="cpu").unflatten(1, kernel)  # [k*l,k,l]
    try:
        found = torch.convolution(numbers, picks[None] if geometry.transposed else picks[:, None], None, *geometry)
    except RuntimeError:
        return None
    rows = found[0].round().long() - 1  # -1 for padding
    return torch.where(rows < 0, height * width, rows).permute(1, 2, 0).contiguous()


class _EventConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, tiles, events, geometry, grid):
        ctx.save_for_backward(x, weight)
        ctx.events, ctx.geometry = events, geometry
        channels = weight.shape[1 if geometry.transposed else 0]
        return events.convolve(tiles, channels).view(len(x), *grid, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        check_first_derivative()
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows = grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = ctx.events.weight_gradient(grad.permute(0, 2, 3, 1).flatten(0, 2))
        dense = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and rows is None, False)
        if any(dense):
            backward = torch.ops.aten.convolution_backward
            grad_x, grad_weight, _ = backward(grad, x, weight.to(x.dtype), None, *ctx.geometry, dense)
        if rows is not None:
            grad_weight = rows.view(*weight.shape[2:], x.shape[1], -1).permute(3, 2, 0, 1)
            grad_weight = grad_weight.transpose(0, 1) if ctx.geometry.transposed else grad_weight
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


Convolution = nn.Conv2d | nn.ConvTranspose2d


def _weight(conv: Convolution) -> Tensor:
    """The weights of a convolution, as `[C',C,k,l]` also if it is transposed."""
    return conv.weight.transpose(0, 1) if conv.transposed else conv.weight


def _computes(conv: Convolution, x: Tensor, channels: int) -> bool:
    """Whether events compute this layer, and fast; torch computes others, or says what is wrong with them."""
    if not _is_simple(conv, x, channels):
        return False
    dtype = computed_dtype(x)
    return (
        is_exactly(conv, nn.Conv2d, nn.ConvTranspose2d)
        and computed_dtype(conv.weight) == dtype
        and has(f"event_pack_{name_of(conv.weight.dtype)}_{name_of(dtype)}")
    )


def _is_simple(conv: Convolution, x: Tensor, channels: int) -> bool:
    """Whether a layer is wide enough, in one group, with zeros around its input `x` of so many channels."""
    outputs, inputs = _weight(conv).shape[:2]
    if min(inputs, outputs) < NARROWEST or inputs != channels or x.numel() == 0 or not readable(x, conv.weight):
        return False
    return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The type in which convolutions of `x` compute: its own, or that of autocast, which leaves float64 as it is."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


@torch.compiler.disable  # the compiler cannot trace into the library
def convolve(conv: Convolution, spikes: Tensor) -> Tensor | None:
    """A convolution without its bias: spikes `[G,C,H,W]` to `[G,C',H',W']`; None if torch should compute it."""
    if spikes.dim() != 4 or not _computes(conv, spikes, spikes.shape[1]):
        return None
    spikes = spikes.to(computed_dtype(spikes)).contiguous(memory_format=torch.channels_last)
    found = _events_of(conv, spikes)
    tiles = None if found is None else pack(_weight(conv), spikes.dtype)
    return None if found is None or tiles is None else _EventConv.apply(spikes, conv.weight, tiles, *found)


def convolve_whole(conv: nn.Conv2d, spikes: Tensor, tiles: Tensor, units: Tensor) -> Tensor | None:
    """A convolution without its bias, of spikes uint8 `[G,C,H,W]`, with packed int8 weights: float32 `[G,C',H',W']`.

    None if torch should compute it.
    """
    if not _is_simple(conv, spikes, spikes.shape[1]):
        return None
    found = _events_of(conv, spikes.contiguous(memory_format=torch.channels_last))
    if found is None:
        return None
    events, _, grid = found
    return events.convolve(tiles, len(units), units).view(len(spikes), *grid, -1).permute(0, 3, 1, 2)


def _events_of(conv: Convolution, spikes: Tensor) -> tuple[Events, Geometry, torch.Size] | None:
    """The events of channels-last spikes `[G,C,H,W]` for a convolution, and the outputs' grid; else None."""
    padding = cast(tuple[int, int], conv.padding)
    geometry = Geometry(conv.stride, padding, conv.dilation, conv.transposed, conv.output_padding)
    table = _neighbours(*spikes.shape[2:], conv.weight.shape[2:], geometry)
    rows = spikes.detach().permute(0, 2, 3, 1).flatten(1, 2)
    events = None if table is None else find_events(rows, table.flatten(0, 1))
    return None if table is None or events is None else (events, geometry, table.shape[:2])


@torch.compiler.disable
def convolve_at(conv: nn.Conv2d, spikes: Tensor, rows: Tensor) -> Tensor | None:
    """`spiking.convolve_at`, without gradients: spikes `[S,R,C]` to `[S,P,C']`; None if torch should compute it."""
    if torch.is_grad_enabled() or not _computes(conv, spikes, spikes.shape[2]):
        return None
    spikes = spikes.to(computed_dtype(spikes)).contiguous()
    events = find_events(spikes, rows.long().contiguous())
    tiles = None if events is None else pack(conv.weight, spikes.dtype)
    if events is None or tiles is None:
        return None
    return events.convolve(tiles, len(conv.weight)).unflatten(0, (len(spikes), len(rows)))
