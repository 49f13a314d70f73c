"""The device and the precision a run computes with."""

import ctypes
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from errors import UserError
from pipeline import distributed

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Machine:
    """Where and how precisely the networks run; weights and optimizer are float32 either way."""

    device: torch.device
    bf16: bool
    compile: bool = False

    def place(self, network: Network) -> Network:
        """Move a network there, in place: channels last, and its forward pass through torch.compile if chosen."""
        network.to(self.device, memory_format=torch.channels_last)
        if self.compile:
            network.compile()
        return network

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
    return distributed.own_cuda_device(device) if device.type == "cuda" else device


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


def choose_machine(device: str, precision: str, compile: bool = False) -> Machine:
    """The machine for `--device` and `--precision`: "auto" is bf16 where the hardware has it. Raises UserError."""
    found = find_device(device)
    (lacking,) = distributed.most(not has_fast_bf16(found))  # on any of several machines
    return Machine(found, precision == "bf16" or (precision == "auto" and not lacking), compile)
