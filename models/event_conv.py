"""Event-driven convolutions on the CPU: they add up the weights of the inputs that fired and skip the rest.

In the trained denoiser 3 to 9 % of a convolution's inputs are spikes; a dense convolution multiplies zeros for the
rest. If the share of spikes is small enough, `event_conv.cpp` computes the layer and its weight gradient from a list of
the spikes. The gradient with respect to the spikes is not sparse and stays dense. Results differ from those of dense
convolutions by rounding alone and do not depend on the number of threads.
"""

import functools

import torch
from torch import Tensor, nn

from models.fused_lif import NAMES, available, call

TILE = 64  # columns, as in event_conv.cpp
NARROWEST = 64  # input and output channels; in narrower layers, listing the spikes costs more than it saves
LARGEST_SHARE = {
    torch.bfloat16: 0.06 if torch.cpu._is_amx_tile_supported() else 0.2,  # AMX makes dense products five times faster
    torch.float32: 0.2,
    torch.float64: 0.2,
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
        fired = torch.empty(int(starts[-1]), dtype=torch.int32)
        call(f"event_list_{NAMES[spikes.dtype]}", spikes, starts, grids * rows, channels, fired)
        sizes = (grids, rows, *table.shape, channels)
        self.offsets = torch.empty(self.outputs + 1, dtype=torch.int64)
        call("event_gather", starts, fired, table, *sizes, self.offsets, None)
        self.numbers = torch.empty(int(self.offsets[-1]), dtype=torch.int32)
        call("event_gather", starts, fired, table, *sizes, self.offsets, self.numbers)

    def convolve(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of the rows of `weight [C',C,k,k]`, rounded to `dtype`, of each output's spikes: `[G*P,C']`."""
        channels, inputs, height, width = weight.shape
        tiles = torch.empty(-(-channels // TILE), self.width, TILE, dtype=dtype)
        strides = (weight.stride(3), weight.stride(1), weight.stride(0))
        kernel = f"event_pack_{NAMES[weight.dtype]}_{NAMES[dtype]}"
        call(kernel, weight, *strides, height * width, inputs, channels, tiles)
        out = torch.empty(self.outputs, channels, dtype=dtype)
        sizes = (self.outputs, self.width, channels)
        call(f"event_forward_{NAMES[dtype]}", self.offsets, self.numbers, tiles, *sizes, out)
        return out

    def weight_gradient(self, grad: Tensor) -> Tensor:
        """Gradient `[K*C,C']` of the rows of weights, at least float32, given that of the outputs, `[G*P,C']`."""
        result = torch.zeros(self.width, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        sizes = (self.outputs, *result.shape)
        call(f"event_backward_{NAMES[grad.dtype]}", self.offsets, self.numbers, grad, *sizes, result)
        return result


def find_events(spikes: Tensor, table: Tensor) -> Events | None:
    """The events of contiguous spikes `[G,R,C]`; see `Events` for the table.

    None if a dense convolution is faster, or if an input is neither 0 nor 1.
    """
    rows = spikes.shape[:2].numel()
    starts = torch.empty(rows + 1, dtype=torch.int64)  # where the list of each row begins
    binary = call(f"event_count_{NAMES[spikes.dtype]}", spikes, rows, spikes.shape[2], starts)
    if not binary or starts[-1] > LARGEST_SHARE[spikes.dtype] * spikes.numel():
        return None
    return Events(spikes, starts, table)


@functools.lru_cache
def _neighbours(height: int, width: int, kernel: int, stride: int, padding: int, output_padding: int | None) -> Tensor:
    """The table of a convolution over a grid, `[h',w',kernel^2]`; of a transposed one if `output_padding` is given.

    A transposed convolution is a convolution of stride 1, with a flipped kernel, over a grid with gaps.
    """
    rows = torch.arange(height * width).view(height, width)
    if output_padding is None:
        after = before = padding
    else:
        spread = rows.new_full((stride * (height - 1) + 1, stride * (width - 1) + 1), height * width)
        spread[::stride, ::stride] = rows
        before = kernel - 1 - padding
        rows, after, stride = spread, before + output_padding, 1
    rows = nn.functional.pad(rows, (before, after, before, after), value=height * width)
    windows = rows.unfold(0, kernel, stride).unfold(1, kernel, stride).flatten(2)
    return (windows if output_padding is None else windows.flip(2)).contiguous()


class _EventConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, conv, events, grid):
        transposed = isinstance(conv, nn.ConvTranspose2d)
        out = events.convolve(weight.transpose(0, 1) if transposed else weight, x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.events, ctx.transposed = conv, events, transposed
        return out.view(len(x), *grid, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), conv = ctx.saved_tensors, ctx.conv
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            geometry = (conv.stride, conv.padding, conv.dilation, ctx.transposed, conv.output_padding, conv.groups)
            dense = torch.ops.aten.convolution_backward
            grad_x = dense(grad, x, weight.to(x.dtype), None, *geometry, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            rows = ctx.events.weight_gradient(grad.permute(0, 2, 3, 1).flatten(0, 2))
            grad_weight = rows.view(*weight.shape[2:], x.shape[1], -1).permute(3, 2, 0, 1)
            grad_weight = (grad_weight.transpose(0, 1) if ctx.transposed else grad_weight).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def _worthwhile(conv: nn.Conv2d | nn.ConvTranspose2d, spikes: Tensor) -> bool:
    wide = min(conv.in_channels, conv.out_channels) >= NARROWEST
    known = {conv.weight.dtype, computed_dtype(spikes)} <= NAMES.keys()
    return wide and known and spikes.device.type == "cpu" and available()


def computed_dtype(x: Tensor) -> torch.dtype:
    """The type in which convolutions of `x` compute: its own, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.compiler.disable  # the compiler cannot trace into the library
def convolve(conv: nn.Conv2d | nn.ConvTranspose2d, spikes: Tensor) -> Tensor | None:
    """A convolution without its bias: spikes `[G,C,H,W]` to `[G,C',H',W']`; None if a dense one should be used.

    Kernels must be square, without dilation or groups.
    """
    if not _worthwhile(conv, spikes):
        return None
    spikes = spikes.to(computed_dtype(spikes)).contiguous(memory_format=torch.channels_last)
    output_padding = conv.output_padding[0] if isinstance(conv, nn.ConvTranspose2d) else None
    table = _neighbours(*spikes.shape[2:], conv.kernel_size[0], conv.stride[0], conv.padding[0], output_padding)
    events = find_events(spikes.detach().permute(0, 2, 3, 1).flatten(1, 2), table.flatten(0, 1))
    if events is None:
        return None
    return _EventConv.apply(spikes, conv.weight, conv, events, table.shape[:2])


@torch.compiler.disable
def convolve_at(conv: nn.Conv2d, spikes: Tensor, rows: Tensor) -> Tensor | None:
    """`spiking.convolve_at`, without gradients: spikes `[S,R,C]` to `[S,P,C']`; None if a dense one should be used."""
    if torch.is_grad_enabled() or not _worthwhile(conv, spikes):
        return None
    spikes = spikes.to(computed_dtype(spikes)).contiguous()
    events = find_events(spikes, rows)
    if events is None:
        return None
    return events.convolve(conv.weight, spikes.dtype).unflatten(0, (len(spikes), len(rows)))
