"""Several processes at one run, as torchrun starts them: each computes its share, the first reads and writes.

Whatever the first process reads (options, data, checkpoints) is sent to the others, so that the others need no folder.
Started otherwise there is one process, for which everything here does nothing.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from errors import UserError
from models.kernels import compiled
from models.quantizer import Codebook
from models.reduction import Reduction
from pipeline.runtime.seeds import own_seed

TIMEOUT = timedelta(minutes=30)  # of a process that says nothing: some wait while one trains a feature network

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
_store: dist.Store | None = None  # shared by the processes
_alone = False


def size() -> int:
    """Number of processes; 1 in the context `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank_0() -> bool:
    """Whether this is the one process that reads and writes files, prints and shows progress."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Context in which the processes that torchrun has started together know each other; only one prints."""
    global _store
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    _store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=TIMEOUT)
    if number:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
    try:
        yield
    except BaseException:
        is_first_to_end()
        raise
    dist.destroy_process_group()


def is_first_to_end() -> bool:
    """Whether no other process has ended before its time, which is noted: only the first says why."""
    if _store is None or size() == 1:
        return True
    try:
        return _store.add("ended", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return True


@contextmanager
def in_contact(resume_hint: Callable[[], str]) -> Iterator[None]:
    """Context in which UserError is raised if another process has died, or has not answered in time.

    `resume_hint` is asked then what the user can do, in words.
    """
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: there must be time to say it
        lost = "another process of the run has died or does not answer"
        raise UserError(f"{lost}: {resume_hint()}") from error


@contextmanager
def alone() -> Iterator[None]:
    """Context in which one process computes without the others, which neither wait for it nor take a share."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def on_rank_0(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Decorate a function that writes: the other processes pass over it."""

    @functools.wraps(function)
    def gated(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        if is_rank_0():
            function(*arguments, **options)

    return gated


def from_rank_0(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the one process that calls it; the others wait and are sent it."""
    if size() == 1:
        return compute()
    box: list[Any] = [compute() if is_rank_0() else None]
    dist.broadcast_object_list(box, 0)
    return box[0]


def share(count: int) -> slice:
    """This process's share of `count` things: contiguous, in the order of the processes, of equal size or nearly."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def share_of_batch(count: int) -> tuple[slice, float]:
    """This process's share of a batch of `count` examples, and what its mean weighs in the mean of the batch.

    A batch of fewer examples than processes is computed as a whole by each, so that none has nothing to average.
    """
    if count < size():
        return slice(count), 1 / size()
    here = share(count)
    return here, (here.stop - here.start) / count


def own_noise(generator: torch.Generator) -> torch.Generator:
    """The generator, just seeded alike in all processes, with a seed of its own in each but the first."""
    return generator.manual_seed(own_seed(generator.initial_seed(), rank())) if rank() else generator


def gather(parts: list[Tensor]) -> Tensor:
    """The tensors of all processes, on the CPU, in the order of the processes, one after the other."""
    if size() == 1:
        return torch.cat(parts)
    everyones = [parts] * size()
    dist.all_gather_object(everyones, parts)
    return torch.cat([part for one in everyones for part in one])


def total(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, summed over the processes."""
    if size() == 1:
        return values
    sums = torch.stack(list(values.values()))
    dist.all_reduce(sums)
    return dict(zip(values, sums.unbind(), strict=True))


def _sum_in_place(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _first_in_place(values: Tensor) -> Tensor:
    dist.broadcast(values, 0)
    return values


ALL_PROCESSES = Reduction(total=_sum_in_place, first=_first_in_place)


def most(*numbers: int) -> list[int]:
    """The largest of each number over the processes: all of them take the same decision."""
    if size() == 1:
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def wait_for_all() -> None:
    """Return when all processes have come here."""
    most(0)


def own_cuda_device(wanted: torch.device) -> torch.device:
    """The card of this process, where all `wanted` "cuda"; raises UserError if it was a certain one, or there are none.

    With one process, what was wanted.
    """
    if size() == 1:
        return wanted
    number, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if wanted.index is not None or number >= cards:
        each = "each of several processes takes a CUDA device of its own"
        raise UserError(f"--device {wanted}: {each}; use --device cuda and start at most {cards} on this machine")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def share_training(model: nn.Module, device: torch.device) -> nn.Module:
    """The module whose forward pass trains `model` together with the other processes; `model` itself if there is one.

    Gradients become their mean over the processes. Batch norm takes its statistics over the whole batch: its layers
    are replaced in `model` by SyncBatchNorm, whose state dict is the same. Codebooks restart dead codes together.
    Raises UserError on a CPU without compiler.
    """
    if size() == 1:
        return model
    network = nn.parallel.DistributedDataParallel(model)
    has_norm = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    if has_norm and device.type == "cpu" and not compiled.available():
        raise UserError("several processes on the CPU need a C++ compiler for their batch norm: install g++ or clang++")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # later, since the wrapper refuses it on the CPU: see fused_lif
    for layer in model.modules():
        if isinstance(layer, (nn.SyncBatchNorm, Codebook)):
            layer.reduction = ALL_PROCESSES
    return network
