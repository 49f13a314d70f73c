"""Batch norm and LIF over all spike steps in one compiled pass on the CPU.

On the CPU, SpikingJelly's multi-step LIF is a loop of tensor operations over the spike steps, each of which reads
and writes the whole activation. `fused_lif.cpp` keeps the membrane potential in registers instead. It is compiled by
the system's C++ compiler on first use and kept in the user's cache folder; where nothing can be compiled,
`available()` says so once and the networks run on SpikingJelly's neuron. Same mathematics, same gradients. The kernels
of event_conv.py are compiled into the same library.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("bfloat16.h", "fused_lif.cpp", "event_conv.cpp")]
FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),  # others refuse it
)
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/spiking-diffusion`, or `~/.cache/spiking-diffusion` where the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiking-diffusion"


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _compile() -> Path:
    """Compile the kernels, or find them compiled. Raises OSError or subprocess.CalledProcessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found")
    key = "\n".join((compiler, *FLAGS, platform.machine(), _processor(), *(file.read_text() for file in SOURCES)))
    cache = cache_folder()
    library = cache / f"fused_lif-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / library.name
            units = [str(file) for file in SOURCES if file.suffix == ".cpp"]
            subprocess.run([compiler, *FLAGS, *units, "-o", str(fresh)], check=True, capture_output=True, text=True)
            fresh.replace(library)
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        warnings.warn(
            f"fused LIF not compiled ({reason}); using SpikingJelly's LIFNode and dense convolutions, much slower",
            stacklevel=2,
        )
        return None


@torch.compiler.disable
def available() -> bool:
    """Whether the compiled kernels can be used on this machine; warns once when they cannot."""
    return _library() is not None


def call(name: str, *arguments: Tensor | int | bool | None) -> int:
    """Run a kernel on as many threads as torch has; tensors are handed over as they lie in memory."""
    converted = []
    for argument in arguments:
        if isinstance(argument, bool):
            converted.append(ctypes.c_bool(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        else:
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
    return getattr(_library(), name)(*converted, ctypes.c_int(torch.get_num_threads()))


def _empty_sums(channels: int) -> Tensor:
    return torch.zeros(torch.get_num_threads(), 2, channels, dtype=torch.float64)


def _total(sums: Tensor, rows: int, synchronised: bool) -> tuple[Tensor, int]:
    """Sums `[threads,2,C]` over the threads `[2,C]`, and the rows they are of; over all processes if `synchronised`."""
    total = sums.sum(0)
    if not synchronised:
        return total, rows
    numbers = torch.cat((total.flatten(), total.new_tensor([rows])))
    dist.all_reduce(numbers)
    return numbers[:-1].view_as(total), int(numbers[-1])


def moments(x: Tensor, synchronised: bool = False) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, float64 `[C]`, of channels-last `x [B,C,H,W]`, and the count B*H*W.

    If `synchronised`, of the `x` of all processes together.
    """
    channels = x.shape[1]
    positions = x.numel() // channels
    sums = _empty_sums(channels)
    call(f"moments_{NAMES[x.dtype]}", x, positions, channels, sums)
    total, positions = _total(sums, positions, synchronised)
    mean, square = total / positions
    return mean, (square - mean.square()).clamp_min(0), positions


class _NormLIF(torch.autograd.Function):
    """Normalise with given statistics, then fire; differentiates through batch statistics when `training`.

    `offset` was left out of `x` and of `mean`, from both of which it would cancel in training mode. If `synchronised`,
    the statistics are those of all processes, and so are the sums that the gradient of `x` needs.
    """

    @staticmethod
    def forward(
        ctx, x, offset, weight, bias, mean, invstd, spike_steps, constant, readout, dtype, training, synchronised
    ):
        scale = weight.double() * invstd
        shift = bias.double() - mean * scale
        accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale, shift, mean, invstd = (v.to(accumulator) for v in (scale, shift, mean, invstd))
        readout = None if readout is None else readout.to(accumulator)
        samples = x.shape[0] if constant else x.shape[0] // spike_steps
        positions, channels = samples * x.shape[2] * x.shape[3], x.shape[1]
        shape = (samples if readout is not None else samples * spike_steps, *x.shape[1:])
        out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        ctx.kernel = f"{NAMES[x.dtype]}_{NAMES[dtype]}"
        sizes = (spike_steps, positions, channels, constant)
        call(f"forward_{ctx.kernel}", x, scale, shift, readout, *sizes, out)
        ctx.save_for_backward(x, weight, scale, shift, mean, invstd, readout)
        ctx.sizes, ctx.training, ctx.synchronised = sizes, training, synchronised
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, weight, scale, shift, mean, invstd, readout = ctx.saved_tensors
        channels = x.shape[1]
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        grad = torch.empty_like(x)
        sums = _empty_sums(channels)
        call(f"backward_{ctx.kernel}", x, scale, shift, mean, invstd, readout, *ctx.sizes, grad_out, grad, sums)
        grad_bias, grad_weight = sums.sum(0)
        (total, product), rows = _total(sums, x.numel() // channels, ctx.synchronised)
        # dx = scale * (g - mean(g) - xhat * mean(g * xhat)), written as a g + b x + c
        a = scale.double()
        b = -a * invstd.double() * product / rows if ctx.training else torch.zeros_like(a)
        c = -a * total / rows - b * mean.double() if ctx.training else b
        coefficients = (v.to(scale.dtype) for v in (a, b, c))
        call(f"affine_{NAMES[x.dtype]}", x, *coefficients, x.numel() // channels, channels, grad)
        grad_offset = torch.zeros_like(weight) if ctx.training else (a * grad_bias).to(weight.dtype)
        return grad, grad_offset, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *[None] * 8


@torch.compiler.disable  # the tracer cannot look into the library, and has nothing to gain there
def norm_lif(
    x: Tensor,
    offset: Tensor,
    norm: nn.BatchNorm2d,
    spike_steps: int,
    *,
    constant: bool,
    readout: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Batch norm, then LIF (tau 2, threshold 1, hard reset, ATan surrogate) from rest over all spike steps.

    Args:
        x: `[S*N,C,H,W]`, the spike step varying slowest, or `[N,C,H,W]` when `constant` over the spike steps.
        offset: bias `[C]` of the convolution that made `x` without it.
        norm: its parameters and running statistics are used and, in training mode, updated as if a `constant`
            input had been normalised at each of the S steps. Of a SyncBatchNorm, statistics are taken over all
            processes, as torch itself does on GPUs only.
        readout: weights `[S]`; given, only `sum_s readout[s] * spikes[s]` is computed.
        dtype: of the result; that of `x` when None.

    Returns:
        Spikes `[S*N,C,H,W]`, or the readout `[N,C,H,W]`; channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    synchronised = norm.training and isinstance(norm, nn.SyncBatchNorm)
    if norm.training:
        with torch.no_grad():
            mean, variance, count = moments(x, synchronised)
            count *= spike_steps if constant else 1
            norm.num_batches_tracked += 1
            share = norm.momentum if norm.momentum is not None else (1 / norm.num_batches_tracked).to(norm.running_var)
            norm.running_mean.lerp_((mean + offset).to(norm.running_mean), share)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), share)
    else:
        mean, variance = norm.running_mean.double() - offset.detach(), norm.running_var.double()
    invstd = (variance + norm.eps).rsqrt()
    statistics = (offset, norm.weight, norm.bias, mean, invstd)
    modes = (norm.training, synchronised)
    return _NormLIF.apply(x, *statistics, spike_steps, constant, readout, dtype or x.dtype, *modes)
