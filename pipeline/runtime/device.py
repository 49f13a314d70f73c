"""The device and the precision a run computes with, and what else of the machine its numbers depend on."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from errors import UserError
from pipeline.runtime import processes

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Of x86 processors, the best first: which of them a processor has decides the order of its sums."""
CPU_LISTING = Path("/proc/cpuinfo")  # of Linux
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""Environment variables that have oneDNN compute otherwise than the processor could."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Machine:
    """Where and how precisely the networks run; weights and optimizer are float32 either way."""

    device: torch.device
    bf16: bool

    def to_device(self, network: Network) -> Network:
        """Move a network there, in place, with its convolutions' weights in channels-last order."""
        # the overloads that torch declares lack memory_format together with a device
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def precision(self) -> str:
        """What convolutions compute in: "bf16" or "float32"."""
        return "bf16" if self.bf16 else "float32"

    def autocast(self) -> torch.autocast:
        """Context in which convolutions compute in bfloat16 if that was chosen."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA device, or else the CPU. Raises UserError.

    Of several processes on a machine each has a CUDA device of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device takes auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return processes.own_cuda_device(device) if device.type == "cuda" else device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are done by the hardware; elsewhere they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones.

    By default glibc hands every large tensor back to the system, which clears its pages anew when the next is made: a
    third of the time of a training step of stage 1 on two cores. Peak memory does not change. Elsewhere than on glibc
    nothing is done.
    """
    mmap_threshold, trim_threshold = -3, -1  # parameter numbers of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, -1)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Context in which products in float32 are not rounded to TF32 or bfloat16, whatever the program has chosen."""
    cudnn: Any = torch.backends.cudnn
    settings: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", False)]
    try:
        products = torch.get_float32_matmul_precision()
        before = [cudnn.allow_tf32]
    except RuntimeError:  # it has chosen by the settings that PyTorch has since 2.9, beside which these cannot be read
        mkldnn: Any = torch.backends.mkldnn
        layers = cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, mkldnn.matmul
        products, settings = "highest", [(layer, "fp32_precision", "ieee") for layer in layers]
        before = [layer.fp32_precision for layer in layers]
    try:
        for place, name, value in settings:
            setattr(place, name, value)
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)
        if products != "highest":
            torch.set_float32_matmul_precision(products)


def choose_machine(device: str, precision: str) -> Machine:
    """The machine for `--device` and `--precision`: "auto" is bf16 where the hardware has it. Raises UserError."""
    found = find_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU, too
    (lacking,) = processes.most(not has_fast_bf16(found))  # on any of several machines
    return Machine(found, precision == "bf16" or (precision == "auto" and not lacking))


def processor() -> str:
    """Name of the processor, the best of its instruction sets for matrices, and restrictions on their use."""
    info, flags = {}, []
    if CPU_LISTING.is_file():
        lines = CPU_LISTING.read_text(encoding="utf-8").splitlines()
        info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = info.get("flags", "").split()
    name = info.get("model name") or platform.processor() or platform.machine()
    best = next((each for each in INSTRUCTIONS if each in flags), torch.backends.cpu.get_cpu_capability())
    return ", ".join([name, best, *(f"{key}={os.environ[key]}" for key in RESTRICTIONS if key in os.environ)])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What numbers computed on `device` depend on, precision and packages aside, in words."""
    facts = {"processor": processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
