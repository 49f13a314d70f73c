"""Averaged weights, and batch-norm statistics that belong to the weights they are used with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights; its first steps count for less, as they change most.

    After n steps the decay is `min(decay, (1 + n) / (10 + n))`.
    """

    def average(averaged: Tensors, current: Tensors, steps: Tensor | int) -> None:
        steps = torch.as_tensor(steps)
        rate = 1 - ((1 + steps) / (10 + steps)).clamp_max(decay)
        change = torch._foreach_sub(current, averaged)  # a few calls for all weights: a GPU waits for each call
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(averaged, change)

    return AveragedModel(model, multi_avg_fn=average)


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of a network."""
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def recalibrated(network: nn.Module) -> Iterator[None]:
    """Context whose forward passes give batch norm its statistics, the mean over these passes.

    Nothing else of the network is in training mode meanwhile; afterwards all of it is in evaluation mode.
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean over all batches
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
