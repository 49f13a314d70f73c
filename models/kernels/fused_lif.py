"""Batch norm and a neuron (LIF, PLIF, IF or few-spikes) over all spike steps in one compiled pass on the CPU.

On the CPU, SpikingJelly's multi-step neuron is a loop of tensor operations over the spike steps, each of which reads
and writes all activations. `fused_lif.cpp` keeps the membrane potential in registers instead; outputs and gradients are
the same.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.kernels.compiled import call, check_first_derivative, has, is_exactly, name_of, readable
from models.reduction import SINGLE_PROCESS, Reduction
from parts import TAU, V_THRESHOLD


def moments(x: Tensor, reduction: Reduction = SINGLE_PROCESS) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, float64 `[C]`, of channels-last `x [B,C,H,W]`, and the count B*H*W.

    With a `reduction`, over the `x` of all processes.
    """
    channels = x.shape[1]
    positions = x.numel() // channels
    own = _sums(2, channels)  # mean, and sum of squares about it
    call(f"moments_{name_of(x.dtype)}", x, positions, channels, own)
    (total, _), count = _total(positions * own, positions, reduction)
    mean = total / count
    squares = reduction.total(own[1] + positions * (own[0] - mean).square())
    return mean, (squares / count).clamp_min(0), count


def _sums(count: int, channels: int) -> Tensor:
    """Room for so many sums of each channel."""
    return torch.empty(count, channels, dtype=torch.float64, device="cpu")


def _total(sums: Tensor, rows: int, reduction: Reduction) -> tuple[Tensor, int]:
    """Totals of `sums [2,C]` over the processes, and the total number of rows summed."""
    numbers = reduction.total(torch.cat((sums.flatten(), sums.new_tensor([rows]))))
    return numbers[:-1].view_as(sums), int(numbers[-1])


Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class Dynamics(NamedTuple):
    """A neuron that starts from rest: `H = V + gain (X - leak V)`, spike `s = [H >= threshold]`, `V = H (1 - s)`.

    LIF has the gain `1 / tau`, which a scalar tensor may give, and receive its gradient; IF has gain 1 and leak 0. The
    surrogate gradient is `ds/dH = 1 / (1 + (pi (H - threshold))^2)`; the reset is not detached.
    """

    gain: float | Tensor = 1 / TAU
    leak: float = 1.0
    threshold: float = V_THRESHOLD


class Numbers(NamedTuple):
    """A neuron that sends the nearest multiple of `last` from 0 to `most`, with the gradient of this clipping."""

    last: float
    most: float


PAPERS = Dynamics()
"""The neuron of the paper."""


class _NormLIF(torch.autograd.Function):
    """Normalise with given statistics, then fire; differentiates through batch statistics when `training`.

    `x` and `mean` do not include the bias `offset`, which in training mode would cancel. The gradient with respect to
    `x` needs sums over all examples, which `reduction` extends to all processes.
    """

    @staticmethod
    def forward(ctx, x, offset, weight, bias, mean, invstd, gain, neuron, spike_steps, constant, readout, *modes):
        kernel, dtype, ctx.training, ctx.reduction = modes
        scale = weight.double() * invstd
        shift = bias.double() - mean * scale
        accumulator = torch.promote_types(x.dtype, torch.float32)
        scale, shift, mean, invstd = (v.to(accumulator) for v in (scale, shift, mean, invstd))
        readout = None if readout is None else readout.to(accumulator)
        neuron = neuron.to(accumulator)
        samples = x.shape[0] if constant else x.shape[0] // spike_steps
        positions, channels = samples * x.shape[2] * x.shape[3], x.shape[1]
        shape = (samples if readout is not None else samples * spike_steps, *x.shape[1:])
        out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
        ctx.kernel = kernel
        sizes = (spike_steps, positions, channels, constant)
        call(f"forward_{ctx.kernel}", x, scale, shift, readout, *sizes, out, neuron)
        ctx.save_for_backward(x, weight, scale, shift, mean, invstd, gain, neuron, readout)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad_out):
        check_first_derivative()
        x, weight, scale, shift, mean, invstd, gain, neuron, readout = ctx.saved_tensors
        channels, learns = x.shape[1], ctx.needs_input_grad[6]
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        grad = torch.empty_like(x)
        sums = _sums(3, channels)
        buffers = (grad_out, grad, sums)
        call(f"backward_{ctx.kernel}", x, scale, shift, mean, invstd, readout, *ctx.sizes, *buffers, neuron, learns)
        grad_bias, grad_weight, grad_gain = sums
        (total, product), rows = _total(sums[:2], x.numel() // channels, ctx.reduction)
        # dx = scale * (g - mean(g) - xhat * mean(g * xhat)), written as a g + b x + c
        a = scale.double()
        b = -a * invstd.double() * product / rows if ctx.training else torch.zeros_like(a)
        c = -a * total / rows - b * mean.double() if ctx.training else b
        coefficients = (v.to(scale.dtype) for v in (a, b, c))
        call(f"affine_{name_of(x.dtype)}", x, *coefficients, x.numel() // channels, channels, grad)
        grad_offset = torch.zeros_like(weight) if ctx.training else (a * grad_bias).to(weight.dtype)
        of_norm = (grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None)
        return grad, grad_offset, *of_norm, grad_gain.sum().to(gain.dtype) if learns else None, *[None] * 8


def _computes(
    x: Tensor,
    offset: Tensor,
    norm: Norm,
    gain: Tensor,
    spike_steps: int,
    constant: bool,
    readout: Tensor | None,
    kernel: str,
) -> bool:
    """Whether the kernels compute this batch norm of these currents; torch computes others, or says what is wrong."""
    if not is_exactly(norm, nn.BatchNorm2d, nn.SyncBatchNorm) or not norm.track_running_stats or x.dim() != 4:
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    held = [tensor for tensor in tensors if tensor is not None]
    if len(held) < len(tensors) or not readable(x, offset, *held, gain, readout):
        return False
    (samples, channels), steps, values = x.shape[:2], 1 if constant else spike_steps, (offset, *held[:4])
    if spike_steps < 1 or samples % steps or channels == 0 or any(value.shape != (channels,) for value in values):
        return False
    if readout is not None and (readout.shape != (spike_steps,) or readout.requires_grad):
        return False
    if norm.training and isinstance(norm, nn.SyncBatchNorm):
        enough = hasattr(norm, "reduction")  # other processes have values, too
    else:
        enough = not norm.training or x.numel() // channels * spike_steps // steps > 1
    double = x.dtype == torch.float64
    same = all((value.dtype == torch.float64) == double for value in (*values, gain))
    return enough and same and has(f"forward_{kernel}")


@torch.compiler.disable  # the compiler cannot trace the library, and would gain nothing
def norm_lif(
    x: Tensor,
    offset: Tensor,
    norm: Norm,
    spike_steps: int,
    *,
    constant: bool,
    readout: Tensor | None = None,
    dtype: torch.dtype | None = None,
    neuron: Dynamics | Numbers = PAPERS,
) -> Tensor | None:
    """Batch norm, then a neuron from rest over all spike steps.

    Args:
        x: `[S*N,C,H,W]`, the spike step varying slowest, or `[N,C,H,W]` when `constant` over the spike steps.
        offset: bias `[C]` of the preceding convolution, which `x` does not include.
        norm: its parameters and running statistics are used and, in training mode, updated as if a `constant`
            input had been normalised at each of the S steps. For a SyncBatchNorm, which torch itself supports on
            GPUs only, statistics are over all processes: it must have an attribute `reduction`.
        readout: weights `[S]`; if given, only `sum_s readout[s] * spikes[s]` is computed.
        dtype: type of the result, by default that of `x`.
        neuron: what it computes; see Dynamics and Numbers.

    Returns:
        Spikes `[S*N,C,H,W]`, or the readout `[N,C,H,W]`; channels-last. None where the kernels do not compute this.
    """
    dtype = dtype or x.dtype
    kind, gain = ("sending", 1.0) if isinstance(neuron, Numbers) else ("firing", neuron.gain)
    kernel = f"{kind}_{name_of(x.dtype)}_{name_of(dtype)}"
    if not isinstance(gain, Tensor):
        gain = torch.tensor(gain, dtype=torch.promote_types(x.dtype, torch.float32), device="cpu")
    if not _computes(x, offset, norm, gain, spike_steps, constant, readout, kernel):
        return None
    x = x.contiguous(memory_format=torch.channels_last)
    sync = norm.training and isinstance(norm, nn.SyncBatchNorm)
    reduction = cast(Reduction, norm.reduction) if sync else SINGLE_PROCESS
    tracked, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
    assert tracked is not None and running_mean is not None and running_var is not None
    if norm.training:
        with torch.no_grad():
            mean, variance, count = moments(x, reduction)
            count *= spike_steps if constant else 1
            tracked += 1
            share = norm.momentum if norm.momentum is not None else (1 / tracked).to(running_var)
            running_mean.lerp_((mean + offset).to(running_mean), share)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), share)
    else:
        mean, variance = running_mean.double() - offset.detach(), running_var.double()
    invstd = (variance + norm.eps).rsqrt()
    statistics = (offset, norm.weight, norm.bias, mean, invstd)
    numbers = neuron if isinstance(neuron, Numbers) else (float(gain.detach()), neuron.leak, neuron.threshold)
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    modes = (kernel, dtype, norm.training, reduction)
    return _NormLIF.apply(x, *statistics, gain, values, spike_steps, constant, readout, *modes)
