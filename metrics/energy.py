"""Synaptic operations and energy of a spiking network, compared with the same network without spikes.

A synaptic operation is one use of one weight of a convolution, transposed convolution or linear layer. If the layer's
input is spikes, it is an accumulate (AC) and is counted only where a spike arrives. If the input is real-valued, it is
a multiply-accumulate (MAC) and is always counted, also for zeros. SpikingJelly's `SynOpCounter` counts operations while
the network runs.

- The input of a layer is spikes if all its values, over the whole batch, are 0 or 1 (SpikingJelly's
  `is_binary_tensor`); real values that all happen to be 0 or 1 cannot be distinguished from spikes. Neurons that send
  numbers as several binary spikes have a method for it, `binary_spikes`; each is an accumulate. First layers have
  real-valued input (direct coding: pixels; embeddings in the spike generator; tokens and timestep in the denoiser) and
  are counted as MACs at every spike step, although their input is constant. Last layers have spikes as input and are
  counted as ACs at every step.
- Borders: a weight that would meet zero padding, or an output that a transposed convolution crops, is not an operation,
  with or without spikes. (The usual formulas and SpikingJelly's `MACCounter` count them: 22 % more for 3x3 weights on a
  7x7 grid.) If all neurons fired at every step, there would be S times the operations of the network without spikes.
- A layer marked `one_hot` (see `models.spiking.one_hot`) has one-hot input: tokens, prototypes or labels. With spikes
  it is counted like any other. A network without spikes does not multiply there but looks weights up, which is memory
  access and therefore not counted: `dense_macs` are 0. (The additions of the rows that it looks up, some 0.05 % of all
  its operations, are left out as well.)
- Not counted: biases and batch norm (folded into the preceding layers), readouts (one update per output and step,
  without a synapse), and the nearest-code search (K D MACs per code, with or without spikes).

Energy: 4.6 pJ per MAC, 0.9 pJ per AC; 32-bit floats, 45 nm (Horowitz, "Computing's energy problem", ISSCC 2014).

What neurons and memory take is counted beside it, after Lemaire et al., "An Analytical Estimation of Spiking Neural
Networks Energy Efficiency" (arXiv 2210.13107):

- A neuron is updated at every spike step, a few-spikes neuron at each of its digits. An update is a MAC.
- A synaptic operation reads a weight, and reads and writes what it adds to. An update reads and writes a potential. A
  spike is written once and read once by each layer that it goes to, and so is a real input. A layer without spikes
  reads an input and a weight for each MAC, and writes each output once.
- Reading or writing a word of 32 bits costs an access to a memory that holds just the layer's weights, outputs or
  inputs: see `picojoules_per_access`. Spikes wait in a small one.
- Neurons that are not called as modules (of an FSVAE's prior) have no part in this.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based.neuron import BaseNode, SimpleBaseNode
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter, is_binary_tensor
from torch import Tensor, nn

PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9
WORD = 4  # bytes
MEMORIES = (2**13, 2**15, 2**20), (10.0, 20.0, 100.0)  # bytes, and pJ of an access; 45 nm, from the same article
PICOJOULES_PER_SPIKE = MEMORIES[1][0]  # to write one, or to read it
NODES = (BaseNode, SimpleBaseNode)  # SpikingJelly's base classes of neurons
AXES = {nn.Conv2d: 3, nn.ConvTranspose2d: 3, nn.Linear: 1}  # layers, and the number of axes of an input without batch


@dataclass(frozen=True)
class Operations:
    """Synaptic operations per image: `macs`, `acs`, and the `dense_macs` of the same network without spikes.

    Without spikes each layer runs once, on real values, instead of at every spike step, and one-hot input is looked up.
    `spikes` are those that layers of weights receive: one that goes to two layers counts twice. `updates` are those of
    neurons; `memory` and `dense_memory` are the energy of memory access in picojoules. Operations can be added, and
    multiplied by a number of runs, as in `passes * mean_pass + decoding`.
    """

    macs: float = 0
    acs: float = 0
    dense_macs: float = 0
    spikes: float = 0
    updates: float = 0
    memory: float = 0
    dense_memory: float = 0

    @property
    def energy(self) -> float:
        """Energy of the synaptic operations of the spiking network in picojoules per image."""
        return PICOJOULES_PER_MAC * self.macs + PICOJOULES_PER_AC * self.acs

    @property
    def dense_energy(self) -> float:
        """Energy of the same network without spikes in picojoules per image."""
        return PICOJOULES_PER_MAC * self.dense_macs

    @property
    def neuron_energy(self) -> float:
        """Energy of the updates of neurons in picojoules per image."""
        return PICOJOULES_PER_MAC * self.updates

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, runs: float) -> "Operations":
        return Operations(*(runs * own for own in astuple(self)))


def picojoules_per_access(words: int) -> float:
    """Energy of reading or writing a word of a memory of this many: linear between 8 KiB, 32 KiB and 1 MiB.

    A smaller memory costs as much as the smallest; a larger one is made of several of the largest.
    """
    return float(np.interp(WORD * words, *MEMORIES))


def count_layers(model: nn.Module, call: Callable[[], Any], images: int, spike_steps: int = 1) -> dict[str, Operations]:
    """Operations per image of each layer that `call()` runs, by its name in `model`, in the order in which they run.

    These are layers of weights, and layers of neurons, which have `updates` and `memory` alone. `call()` runs `model`
    on `images` images with `spike_steps` (1: no spikes). The model must be in evaluation mode, and call each layer as a
    module at every spike step, as our networks do where a layer has hooks. Raises ValueError in training mode, if no
    layer ran, or if a layer did not run a multiple of `spike_steps` times per image.
    """
    if model.training:
        raise ValueError("operations are counted in evaluation mode")
    sends_numbers = _sends_numbers(model)
    runs: Counter[nn.Module] = Counter()
    totals: dict[nn.Module, Operations] = defaultdict(Operations)

    def record(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        axes = AXES[kind_of(layer)]
        runs[layer] += x.shape[:-axes].numel()
        full = len(x) * _synaptic_operations(layer, torch.ones_like(x[:1], dtype=layer.weight.dtype))
        spikes = _as_spikes(x, sends_numbers)
        acs = sum(_synaptic_operations(layer, each.to(layer.weight.dtype)) for each in spikes)
        number = sum(int(each.count_nonzero()) for each in spikes)
        macs, dense = 0 if spikes else full, 0 if getattr(layer, "one_hot", False) else full
        sizes = (x.shape[-axes:].numel(), layer.weight.numel(), output.shape[-axes:].numel())
        of_input, of_weight, of_output = map(picojoules_per_access, sizes)
        received = PICOJOULES_PER_SPIKE * number if spikes else of_input * x.numel()
        memory = received + (macs + acs) * (of_weight + 2 * of_output)
        dense_memory = dense * (of_input + of_weight) + output.numel() * of_output
        totals[layer] += Operations(macs, acs, dense, number, memory=memory, dense_memory=dense_memory)

    def record_neurons(layer: Any, _inputs: tuple[Tensor], output: Tensor) -> None:
        updates = output.numel() * getattr(layer, "digits", 1)
        sent = sum(int(each.count_nonzero()) for each in _as_spikes(output, sends_numbers) or [output])
        accesses = 2 * updates * picojoules_per_access(output.shape[2:].numel())  # [S,N,...]
        totals[layer] += Operations(updates=updates, memory=accesses + PICOJOULES_PER_SPIKE * sent)

    with torch.no_grad(), ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, tuple(AXES)):
                hooks.enter_context(layer.register_forward_hook(record))
            elif isinstance(layer, NODES):
                hooks.enter_context(layer.register_forward_hook(record_neurons))
        call()
    if not runs or any(n % (spike_steps * images) for n in runs.values()):
        raise ValueError(f"layers did not run {spike_steps} times for each of {images} images")
    names = {layer: name for name, layer in model.named_modules()}
    return {names[layer]: _per_image(total, images, spike_steps) for layer, total in totals.items()}


def of_weights(layers: dict[str, Operations]) -> dict[str, Operations]:
    """Of the layers that were counted, those of weights."""
    return {name: counted for name, counted in layers.items() if not counted.updates}


def _per_image(total: Operations, images: int, spike_steps: int) -> Operations:
    """What was counted on some images, of one, and without spikes at one of the spike steps."""
    own = Operations(*(value / images for value in astuple(total)))
    return replace(own, dense_macs=own.dense_macs / spike_steps, dense_memory=own.dense_memory / spike_steps)


def _sends_numbers(model: nn.Module) -> Any:
    """Of the layers of neurons that send numbers as several binary spikes, one with most digits; None if there is none.

    What the others send are such numbers, too, with as many spikes.
    """
    sending: list[Any] = [layer for layer in model.modules() if hasattr(layer, "binary_spikes")]
    return max(sending, key=lambda layer: layer.digits, default=None)


def _as_spikes(x: Tensor, sends_numbers: Any) -> list[Tensor]:
    """The binary tensors that x is the sum of, each with a weight of its own; none if it is not spikes.

    These are x itself, or what a layer with the method `binary_spikes` sends one after another, as numbers or, in a
    network in whole numbers, as counts, uint8.
    """
    counts = x.dtype == torch.uint8 and sends_numbers is not None
    if not counts and is_binary_tensor(x):
        return [x]
    if sends_numbers is None or not (counts or torch.equal(sends_numbers.single_step_forward(x), x)):
        return []  # numbers would pass as they are
    return list(sends_numbers.binary_spikes(x))


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Which layer of torch, of those with weights, a layer is."""
    return next(kind for kind in AXES if isinstance(layer, kind))


def _synaptic_operations(layer: nn.Module, spikes: Tensor) -> int:
    """Operations of a layer of weights for `spikes`. (The counter skips zero weights if all are 0 or 1.)"""
    counter = SynOpCounter()
    # inference mode would hide the operations from the counter
    with torch.inference_mode(False), torch.no_grad(), DispatchCounterMode([counter]):
        kind_of(layer).forward(layer, spikes)  # layer(spikes) would call the hook again
    return counter.get_total()


def firing_rates(model: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Mean spikes per neuron and spike step in `call()`, by the name in `model` of each layer of neurons that ran.

    Of neurons that send numbers, mean spikes per neuron and digit. Needs the same mode as `count_layers`. Raises
    ValueError if there are neurons and none ran.
    """
    from spikingjelly.activation_based.monitor import OutputMonitor  # here because it imports TensorBoard

    sends_numbers = _sends_numbers(model)

    def spikes_each(sent: Tensor) -> float:
        return sum(spikes.float().mean().item() for spikes in _as_spikes(sent, sends_numbers) or [sent])

    with torch.no_grad(), OutputMonitor(model, NODES, spikes_each) as monitor:
        call()
    if monitor.monitored_layers and not monitor.records:
        raise ValueError("no neuron ran")
    runs = {name: monitor[name] for name in monitor.monitored_layers}
    digits = {name: getattr(layer, "digits", 1) for name, layer in model.named_modules()}
    return {name: sum(spikes) / len(spikes) / digits[name] for name, spikes in runs.items() if spikes}
