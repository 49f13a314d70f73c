"""Public limits of three neuromorphic chips, and what a layer of spiking neurons takes of each.

Weights have 8 bits. What the makers do not publish is not checked, so what breaks no limit here may still not fit.
"""

import copy
from collections.abc import Callable, Sequence
from math import ceil, inf, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import nn

from metrics.energy import Operations, kind_of
from models.neurons import OWN

KIBI = 2**10


class Layer(NamedTuple):
    """A layer of weights and the neurons that it feeds; shapes `(C,H,W)` of its input and its output for one image.

    `counted` is what it does for an image or a sample.
    """

    name: str
    module: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    counted: Operations

    @property
    def kind(self) -> str:
        """In words, as "Conv2d 3x3"."""
        sides = "x".join(map(str, getattr(self.module, "kernel_size", ())))
        return f"{kind_of(self.module).__name__} {sides}".strip()

    @property
    def weights(self) -> int:
        """How many; synapses of a convolution share them."""
        return int(self.module.weight.numel())

    @property
    def neurons(self) -> int:
        """One for each output."""
        return prod(self.outputs)

    def connections(self) -> tuple[int, int, int]:
        """How many synapses it has; the most that a neuron has, fan-in; and the most that an input has, fan-out.

        With weights of 1, an output is the number of its synapses, and so is the gradient of an input.
        """
        layer, x = copy.deepcopy(self.module).double(), torch.ones(1, *self.inputs, dtype=torch.float64)
        for parameter, value in zip(layer.parameters(), (1, 0), strict=False):  # weight, and bias if it has one
            nn.init.constant_(parameter, value)
        with torch.enable_grad():
            y = kind_of(layer).forward(layer, x.requires_grad_())
            (met,) = torch.autograd.grad(y.sum(), x)
        return int(y.sum()), int(y.max()), int(met.max())


class Needs(NamedTuple):
    """What a layer takes of a chip: cores, and in words the limit that decides; or the limits that it breaks."""

    cores: int
    deciding: str
    broken: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.broken:
            return "; ".join(self.broken)
        return f"{self.cores} core{'s' * (self.cores > 1)}: {self.deciding}"


class Chip(NamedTuple):
    """A chip: its cores, what a layer takes of it, which neurons it has, and where its limits are published."""

    name: str
    cores: int
    needs: Callable[[Layer], Needs]
    placed: Callable[[Sequence[Layer]], int]
    neurons: tuple[str, ...]
    sources: str


# ---- Speck 2e and 2f: a core is a convolution and its neurons

SPECK_WEIGHTS = [KIBI * size for size in (16, 16, 16, 32, 32, 64, 64, 16, 16)]  # words of 8 bits of each core
SPECK_NEURONS = [KIBI * size for size in (64, 64, 64, 32, 32, 16, 16, 16, 16)]  # words of 16 bits


def speck_words(layer: Layer) -> tuple[int, int]:
    """Words of weights and of neurons: sides of kernels and maps, and channels, are rounded up to powers of 2."""
    outputs, height, width = layer.outputs
    taps = layer.module.kernel_size[0] * layer.module.kernel_size[1]
    weights = layer.inputs[0] * _power(taps) * _power(outputs)
    return weights, outputs * _power(height) * _power(width)


def _power(number: int) -> int:
    """The next power of 2."""
    return 1 << (number - 1).bit_length()


def speck_fits(layer: Layer) -> list[bool]:
    """Into the memory of which cores a layer fits."""
    weights, neurons = speck_words(layer)
    return [weights <= w and neurons <= n for w, n in zip(SPECK_WEIGHTS, SPECK_NEURONS, strict=True)]


def speck(layer: Layer) -> Needs:
    """Of Speck."""
    module = layer.module
    if not isinstance(module, nn.Conv2d):
        return Needs(0, "", (f"{layer.kind}, not a convolution",))
    (kernel, other), (weights, neurons) = module.kernel_size, speck_words(layer)
    limits = {
        "input is not spikes": layer.counted.macs > 0,
        f"{module.groups} groups, not 1": module.groups > 1,
        f"kernel {kernel}x{other}, not square and up to 16": kernel != other or kernel > 16,
        f"stride {module.stride[0]}, not 1, 2, 4 or 8": not {*module.stride} <= {1, 2, 4, 8},
        f"{max(layer.inputs[0], layer.outputs[0])} channels of 1024": max(layer.inputs[0], layer.outputs[0]) > 1024,
        f"map of side {max(layer.outputs[1:])}, not up to 64": max(layer.outputs[1:]) > 64,
        f"{weights // KIBI} Ki weights of 64 Ki": weights > max(SPECK_WEIGHTS),
        f"{neurons // KIBI} Ki neurons of 64 Ki": neurons > max(SPECK_NEURONS),
    }
    broken = tuple(words for words, is_broken in limits.items() if is_broken)
    both = f"{ceil(weights / KIBI)} Ki weights and {ceil(neurons / KIBI)} Ki neurons"
    if not broken and not any(speck_fits(layer)):
        broken = (f"{both}, which no core has together",)
    return Needs(1, f"{both}, one of {sum(speck_fits(layer))} cores" if not broken else "", broken)


def placed_on_speck(layers: Sequence[Layer]) -> int:
    """How many of the layers can be on one chip: as many as can have a core each that they fit into."""
    fitting = [speck_fits(layer) for layer in layers if not speck(layer).broken]
    return int((maximum_bipartite_matching(csr_array(fitting)) >= 0).sum()) if fitting else 0


# ---- chips with many equal cores, over which a layer is split


def of_equal_cores(
    name: str, cores: int, sources: str, *, memory: int, neurons: float = inf, of_neuron: int = 0
) -> Chip:
    """A chip whose cores have so many bytes, of which a neuron takes `of_neuron`, and so many neurons of any kind.

    A layer takes at least so many cores: each has a part of the neurons, and the weights are counted once. The smallest
    layers are placed first.
    """

    def needs(layer: Layer) -> Needs:
        taken = layer.weights + of_neuron * layer.neurons
        by = {
            max(1, ceil(layer.neurons / neurons)): f"{layer.neurons:,} of {neurons:,} neurons",
            ceil(taken / memory): f"{ceil(taken / KIBI):,} of {memory // KIBI} KiB",
        }
        return Needs(max(by), by[max(by)])

    def placed(layers: Sequence[Layer]) -> int:
        return int((np.cumsum(sorted(needs(layer).cores for layer in layers)) <= cores).sum())

    return Chip(name, cores, needs, placed, tuple(each.__name__ for each in OWN), sources)  # neurons are programs there


CHIPS = (
    Chip(
        "Speck 2f",
        len(SPECK_WEIGHTS),
        speck,
        placed_on_speck,
        ("IF",),
        "the maker's, SynSense: https://sinabs.readthedocs.io and sinabs/backend/dynapcnn in its repository, by whose "
        "formulas memory is counted; Speck 2e has the same",
    ),
    of_equal_cores(
        "Loihi 2",
        128,
        "128 cores of 192 KB and up to 8,192 neurons as others report them (https://open-neuromorphic.org); Intel does "
        "not publish the limits of axons. Weights are counted once, as convolutions share them",
        memory=192 * KIBI,
        neurons=8192,
    ),
    of_equal_cores(
        "SpiNNaker2",
        152,
        "the makers': 152 ARM cores with 128 KB each for programs and data (SpiNNaker2 data sheet, 2021). Neurons are "
        "software: two variables of 32 bits are counted, and the program is not",
        memory=128 * KIBI,
        of_neuron=8,
    ),
)
