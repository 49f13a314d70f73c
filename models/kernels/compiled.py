"""The compiled kernels: how they are built, kept and called, and what they can read.

The system's C++ compiler compiles the sources beside this file on first use; the library is cached if the cache is
writable. Without a compiler, `available()` warns once and the networks run on SpikingJelly's neuron.
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

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from files import from_cache, to_cache

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("bfloat16.h", "tiles.h", "fused_lif.cpp", "event_conv.cpp", "integer.cpp")]
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
        raise RuntimeError("the compiled kernels have no second derivatives: models/reference.py has")


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
