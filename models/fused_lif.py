"""Batch norm and a neuron (LIF, PLIF or IF) over all spike steps in one compiled pass on the CPU.

On the CPU, SpikingJelly's multi-step neuron is a loop of tensor operations over the spike steps, each of which reads
and writes all activations. `fused_lif.cpp` keeps the membrane potential in registers instead; outputs and gradients are
the same. The system's C++ compiler compiles it, and the kernels of event_conv.py with it, on first use; the library
is cached if the cache is writable. Without a compiler, `available()` warns once and the networks run on SpikingJelly's
neuron.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from files import from_cache, to_cache
from models.reduction import SINGLE_PROCESS, Reduction
from parts import TAU, V_THRESHOLD

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("bfloat16.h", "fused_lif.cpp", "event_conv.cpp")]
FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),  # other compilers reject it
)


def _target(compiler: list[str]) -> str:
    """The macros that the compiler predefines: its version, and the features of the processor that `native` means here.

    Compilers are updated, and machines may share a cache folder. Raises OSError or subprocess.CalledProcessError.
    """
    return _run([*compiler, *FLAGS, "-E", "-dM", "-x", "c++", os.devnull])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
    return done.stdout


def _load() -> ctypes.CDLL:
    """The kernels, from the cache or newly compiled. Raises OSError, ValueError or subprocess.CalledProcessError."""
    installed = shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(os.environ.get("CXX", "")) or ([installed] if installed else [])
    if not compiler:
        raise OSError("no C++ compiler found")
    sources = (file.read_text(encoding="utf-8") for file in SOURCES)
    key = "\n".join((*compiler, *FLAGS, _target(compiler), *sources))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.summed.so"
    kept = from_cache(name, _load_checked)
    if kept:
        return kept
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / name
        units = [str(file) for file in SOURCES if file.suffix == ".cpp"]
        _run([*compiler, *FLAGS, *units, "-o", str(fresh)])
        content = fresh.read_bytes()
        return ctypes.CDLL(str(to_cache(name, content + _checksum(content)) or fresh))


def _checksum(content: bytes) -> bytes:
    """The checksum at the end of a cached library, where the loader ignores it."""
    return hashlib.sha256(content).digest()


def _load_checked(path: Path) -> ctypes.CDLL:
    """A cached library. Raises ValueError if it is damaged: running it could crash the process, or worse."""
    content = path.read_bytes()
    if _checksum(content[:-32]) != content[-32:]:
        raise ValueError("wrong checksum")
    return ctypes.CDLL(str(path))


_loading = threading.Lock()


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return _load()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        warnings.warn(
            f"fused LIF not compiled ({reason}); using SpikingJelly's neurons and dense convolutions, much slower",
            stacklevel=2,
        )
        return None


@torch.compiler.disable
def available() -> bool:
    """Whether the compiled kernels can be used on this machine; warns once if not."""
    with _loading:
        return _library() is not None


def has(kernel: str) -> bool:
    """Whether the kernels are available, and one of this name, which ends in the types of its tensors, among them."""
    return available() and hasattr(_library(), kernel)


def name_of(dtype: torch.dtype) -> str:
    """The name of a type, as in the names of kernels."""
    return str(dtype).removeprefix("torch.")


def is_exactly(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer computes what one of these classes does. No kernel stands in for another layer.

    A subclass, hooks, or a forward of its own may compute anything.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) in kinds and "forward" not in vars(layer) and not any(hooks)


def readable(*tensors: Tensor | None) -> bool:
    """Whether kernels can read all of these by address: strided tensors in the memory of the CPU, of no subclass.

    Within `torch.func.vmap`, tensors have no memory of their own; that of a negated view has the other sign.
    """
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and not is_functorch_wrapped_tensor(tensor)
        and (tensor.device.type, tensor.layout, tensor.is_neg()) == ("cpu", torch.strided, False)
        for tensor in tensors
        if tensor is not None
    )


def check_first_derivative() -> None:
    """Called by a backward pass that is no graph itself. Raises RuntimeError if one was asked for (`create_graph`)."""
    if torch.is_grad_enabled():
        raise RuntimeError("the compiled kernels have no second derivatives: choose the reference backend")


def call(name: str, *arguments: Tensor | int | bool | None) -> int:
    """Run a kernel on as many threads as torch uses; it gets the address of each tensor's data."""
    converted: list[ctypes.c_bool | ctypes.c_long | ctypes.c_void_p] = []
    for argument in arguments:
        if isinstance(argument, bool):
            converted.append(ctypes.c_bool(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        else:
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
    return getattr(_library(), name)(*converted, ctypes.c_int(torch.get_num_threads()))


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


PAPERS = Dynamics()
"""The neuron of the paper."""


class _NormLIF(torch.autograd.Function):
    """Normalise with given statistics, then fire; differentiates through batch statistics when `training`.

    `x` and `mean` do not include the bias `offset`, which in training mode would cancel. The gradient with respect to
    `x` needs sums over all examples, which `reduction` extends to all processes.
    """

    @staticmethod
    def forward(ctx, x, offset, weight, bias, mean, invstd, gain, neuron, spike_steps, constant, readout, *modes):
        dtype, ctx.training, ctx.reduction = modes
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
        ctx.kernel = f"{name_of(x.dtype)}_{name_of(dtype)}"
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
        return grad, grad_offset, *of_norm, grad_gain.sum().to(gain.dtype) if learns else None, *[None] * 7


def _computes(
    x: Tensor,
    offset: Tensor,
    norm: Norm,
    gain: Tensor,
    spike_steps: int,
    constant: bool,
    readout: Tensor | None,
    dtype: torch.dtype,
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
    return enough and same and has(f"forward_{name_of(x.dtype)}_{name_of(dtype)}")


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
    neuron: Dynamics = PAPERS,
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
        neuron: what it computes; see Dynamics.

    Returns:
        Spikes `[S*N,C,H,W]`, or the readout `[N,C,H,W]`; channels-last. None where the kernels do not compute this.
    """
    dtype = dtype or x.dtype
    gain = neuron.gain
    if not isinstance(gain, Tensor):
        gain = torch.tensor(gain, dtype=torch.promote_types(x.dtype, torch.float32), device="cpu")
    if not _computes(x, offset, norm, gain, spike_steps, constant, readout, dtype):
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
    values = torch.tensor((float(gain.detach()), neuron.leak, neuron.threshold), dtype=torch.float64, device="cpu")
    modes = (dtype, norm.training, reduction)
    return _NormLIF.apply(x, *statistics, gain, values, spike_steps, constant, readout, *modes)
