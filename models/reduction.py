"""How layers combine tensors across the processes that train a network together."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Reduction(NamedTuple):
    """Two functions of a tensor; a layer uses SINGLE_PROCESS unless it is given those of several processes.

    `total` is its sum over the processes, `first` the tensor of the first process. Either may modify its argument.
    """

    total: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]


def _unchanged(values: Tensor) -> Tensor:
    return values


SINGLE_PROCESS = Reduction(total=_unchanged, first=_unchanged)
