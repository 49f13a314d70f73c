"""Synaptic operations and energy of a spiking network, beside those of the same network without spikes.

A synaptic operation is one use of one weight of a layer: convolution, transposed convolution or linear. It is an
accumulate (AC) where the layer sees spikes, and then counted only where a spike arrives; it is a multiply-accumulate
(MAC) where the layer sees real values, and then all are counted, zeros included. SpikingJelly's `SynOpCounter` counts
them while the network runs. What is counted and what is not:

- A layer sees spikes where all values of its input, over the whole batch, are 0 or 1 (SpikingJelly's
  `is_binary_tensor`): real values that all happen to be 0 or 1 cannot be told apart. First layers see real values
  (direct coding: pixels; embeddings in the spike generator; tokens and timestep in the denoiser) and count as MACs at
  each spike step, although their input stays the same. Last layers see spikes and count as ACs at each step.
- Borders: a weight that would meet zero padding, and an output that a transposed convolution would cut off, is no
  operation, with spikes and without. (The usual formulas and SpikingJelly's `MACCounter` count them, 22 % more for 3x3
  weights on a 7x7 grid.) If all neurons fired at each step, there would be S times the operations without spikes.
- Not counted: biases and batch norm (folded into the layers before them), neurons and readouts (one update a neuron and
  step, no synapse), comparison with the codebook (K D MACs a code, the same with and without spikes), memory.

Energy: 4.6 pJ a MAC, 0.9 pJ an AC; 32-bit floating point, 45 nm (Horowitz, "Computing's energy problem", ISSCC 2014).
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based.monitor import OutputMonitor
from spikingjelly.activation_based.neuron import BaseNode
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter, is_binary_tensor
from torch import Tensor, nn

PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9
AXES = {nn.Conv2d: 3, nn.ConvTranspose2d: 3, nn.Linear: 1}  # layers, and the axes of one input: [C,H,W] or [C]


@dataclass(frozen=True)
class Operations:
    """Synaptic operations per image: `macs`, `acs`, and `dense_macs`, those of the same network without spikes.

    Without spikes each layer runs once instead of at each spike step, on real values. Operations add up, and can be
    multiplied by a number of runs: `passes * mean_pass + decoding` is a whole sample.
    """

    macs: float
    acs: float
    dense_macs: float

    @property
    def energy(self) -> float:
        """Of the network as it is, in picojoules per image."""
        return PICOJOULES_PER_MAC * self.macs + PICOJOULES_PER_AC * self.acs

    @property
    def dense_energy(self) -> float:
        """Of the same network without spikes, in picojoules per image."""
        return PICOJOULES_PER_MAC * self.dense_macs

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.macs + other.macs, self.acs + other.acs, self.dense_macs + other.dense_macs)

    def __rmul__(self, runs: float) -> "Operations":
        return Operations(runs * self.macs, runs * self.acs, runs * self.dense_macs)


def count(model: nn.Module, call: Callable[[], Any], images: int, spike_steps: int = 1) -> Operations:
    """Operations per image of `call()`, which runs `model` on so many images, at so many spike steps (1: no spikes).

    The caller puts the model into evaluation mode and into plain mode, in which each layer is called as a module, at
    each spike step; afterwards all is as it was. Raises ValueError in training mode, or where no layer ran or one did
    not run `spike_steps` times an image (or a multiple of it).
    """
    if model.training:
        raise ValueError("operations are counted in evaluation mode")
    runs, totals = Counter(), Counter()

    def see(layer: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        (x,) = inputs
        axes = next(axes for kind, axes in AXES.items() if isinstance(layer, kind))
        runs[layer] += x.shape[:-axes].numel()
        full = len(x) * _synaptic_operations(layer, torch.ones_like(x[:1]))
        totals["full"] += full
        if is_binary_tensor(x):
            totals["acs"] += _synaptic_operations(layer, x)
        else:
            totals["macs"] += full

    with torch.no_grad(), ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, tuple(AXES)):
                hooks.enter_context(layer.register_forward_hook(see))
        call()
    if not runs or any(n % (spike_steps * images) for n in runs.values()):
        raise ValueError(
            f"layers did not run {spike_steps} times for each of {images} images: is the reference backend chosen?"
        )
    return Operations(totals["macs"] / images, totals["acs"] / images, totals["full"] / images / spike_steps)


def _synaptic_operations(layer: nn.Module, spikes: Tensor) -> int:
    """Uses of the weights of `layer` by its input, zeros and ones. (Were all weights 0 or 1, zeros would not count.)"""
    counter = SynOpCounter()
    # inference mode would hide the operations that are counted
    with torch.inference_mode(False), torch.no_grad(), DispatchCounterMode([counter]):
        layer.forward(spikes)  # layer(spikes) would call the hook again
    return counter.get_total()


def firing_rates(model: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Mean spikes per neuron and spike step in `call()`, for each layer of neurons that ran, by its name in `model`.

    The same modes as for `count`. Raises ValueError where there are neurons and none ran.
    """
    with torch.no_grad(), OutputMonitor(model, BaseNode, lambda spikes: spikes.float().mean().item()) as monitor:
        call()
    if monitor.monitored_layers and not monitor.records:
        raise ValueError("no neuron ran: is the reference backend chosen?")
    runs = {name: monitor[name] for name in monitor.monitored_layers}
    return {name: sum(rates) / len(rates) for name, rates in runs.items() if rates}
