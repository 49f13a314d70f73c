"""Inference in whole numbers: int8 weights, sums without rounding, neurons with whole thresholds.

Float32 or float64 carries the numbers, which are exact in it. Exact sums do not depend on their order: the same weights
give the same bits on every processor, with any number of threads.

- A row of weights is int8 times a power of two (`integer_layers`).
- Batch norm and neurons become thresholds for whole currents, and potentials that decay by a shift (`integer_neurons`).
- What is left in floating point is in float64, and sums of it are in a fixed order: readouts, the tanh of a pixel, and
  the probabilities of codes.
"""

from typing import cast

from torch import Tensor, nn

from models.integer_layers import (
    REAL_UNIT,
    IntegerConv2d,
    IntegerConvTranspose2d,
    IntegerPixelConv2d,
    in_units,
    whole,
)
from models.integer_neurons import IntegerFewSpikes, IntegerLIF
from models.kernels.compiled import is_exactly
from models.kernels.event_conv import Convolution
from models.neurons import FewSpikes, FromRest
from models.quantizer import SpikingQuantizer
from models.residual_svae import SentNumbers
from models.spiking import (
    Block,
    Firing,
    SpikingStack,
    convolve_at,
    is_local,
    membrane_weights,
    one_hot,
    over_steps,
    sum_in_order,
)
from parts import FEW_SPIKES_RANGE

PIXEL_INPUTS = ("encoder.embed", "encoder.snn_convs.0")
REAL_INPUTS = ("vq_layer.poisson.0", "conv1.0")
"""Names of the layers that read embeddings, or tokens and timesteps; their currents have float64."""


def integer_neurons(norm: nn.BatchNorm2d, layer: FromRest) -> IntegerFewSpikes | IntegerLIF:
    """Batch norm and neurons in whole numbers. Raises ValueError for neurons that cannot be."""
    return IntegerFewSpikes(norm, layer) if isinstance(layer, FewSpikes) else IntegerLIF(norm, layer)


class IntegerFiring(nn.Module):
    """What `Firing` is, in whole numbers: counts, or, where no layer follows that knows their unit, numbers."""

    def __init__(self, firing: Firing, numbers: bool = False):
        super().__init__()
        self.lif, self.spike_steps, self.numbers = integer_neurons(firing.norm, firing.lif), firing.spike_steps, numbers

    def forward(self, x: Tensor, readout: None = None) -> Tensor:
        """See Firing; without a readout."""
        counts: Tensor = self.lif(x, self.spike_steps)
        return counts * cast(IntegerFewSpikes, self.lif).last if self.numbers else counts


class IntegerStack(SpikingStack):
    """What `SpikingStack` is, in whole numbers; its neurons do what batch norm did."""

    def __init__(self, stack: SpikingStack):
        layers: list[nn.Module] = []
        for conv, norm, neuron in stack.blocks:
            if conv.bias is not None:  # batch norm subtracts it with the mean
                norm.running_mean, conv.bias = cast(Tensor, norm.running_mean) - conv.bias, None
            layers += [conv, nn.Identity(), integer_neurons(norm, neuron)]
        nn.Sequential.__init__(self, *layers, *([] if stack.head is None else [stack.head]))
        self.spike_steps = stack.spike_steps

    @property
    def is_local(self) -> bool:
        """See SpikingStack; means over the spike steps must be exact, too."""
        return len(self) == 3 and is_local(self[0]) and self.spike_steps.bit_count() == 1

    def fire_at(self, x: Tensor, rows: Tensor, readout: Tensor | None = None) -> Tensor:
        """See SpikingStack; spikes are counts, uint8."""
        ((conv, _, neurons),) = self.blocks
        currents = convolve_at(cast(nn.Conv2d, conv), x, rows)[..., None, None]  # [S,P,C',1,1]
        counts = neurons(currents, self.spike_steps).flatten(-3)
        return counts if readout is None else sum_in_order(readout, counts)

    def _spikes(self, block: Block, x: Tensor, readout: Tensor | None = None) -> Tensor:
        assert readout is None, "its head, if it has one, is called as a module"
        conv, _, neurons = block
        if x.dim() == 4 and not is_exactly(conv, type(conv)):  # hooks, which see each step
            x = x.expand(self.spike_steps, *x.shape)
        return neurons(conv(x) if x.dim() == 4 else over_steps(conv, x), self.spike_steps)


class IntegerQuantizer(SpikingQuantizer):
    """A spiking quantiser in whole numbers: what is read out of spikes is rounded to UNITs."""

    def __init__(self, quantizer: SpikingQuantizer, unit: float):
        codebook_size, embedding_dim = quantizer.embeddings.weight.shape
        sizes = codebook_size, embedding_dim, quantizer.spike_steps
        super().__init__(*sizes, spike_generator=quantizer.spike_generator)
        if hasattr(quantizer, "poisson"):
            self.poisson = quantizer.poisson
        self.load_state_dict(quantizer.state_dict())
        self.embeddings.double()
        self.unit = unit

    def readout(self, spikes: Tensor) -> Tensor:
        """See SpikingQuantizer; of counts of the unit."""
        alpha = self.alpha.double()
        weights = (1 - alpha) * membrane_weights(self.spike_steps, like=alpha) + alpha / self.spike_steps
        return in_units(sum_in_order(self.unit * weights, spikes)).double()


def are_whole(weights: dict[str, Tensor]) -> bool:
    """Whether weights are those of a network in whole numbers."""
    return any(name.endswith((".step_between", ".threshold")) for name in weights)


def in_whole_numbers(network: nn.Module) -> nn.Module:
    """A trained spiking network, changed to whole numbers. Raises ValueError for one that cannot be."""
    layers, unit, codebook = dict(network.named_modules()), _unit_of_spikes(network), getattr(network, "vq_layer", None)
    heads, steps = {getattr(layer, "head", None) for layer in layers.values()}, getattr(network, "spike_steps", 1)
    units = dict.fromkeys(REAL_INPUTS, REAL_UNIT)
    if isinstance(codebook, SentNumbers):
        units["decoder.embed"] = FEW_SPIKES_RANGE / len(codebook.embeddings.weight)
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            wide = layer in heads or name in REAL_INPUTS
            layer = layer.double() if wide else layer
            _replace(network, name, _integer_layer(name, layer, units.get(name, unit), steps))
        elif isinstance(layer, Firing):
            _replace(network, name, IntegerFiring(layer, numbers=name.endswith("fire_codes")))
    for name, layer in layers.items():
        if isinstance(layer, SpikingStack):
            _replace(network, name, IntegerStack(layer))
    if isinstance(codebook, SpikingQuantizer):
        _replace(network, "vq_layer", IntegerQuantizer(codebook, unit))
    for layer in network.modules():
        if not isinstance(layer, IntegerConv2d | IntegerConvTranspose2d):
            for parameter in layer.parameters(recurse=False):
                parameter.data = whole(parameter) if parameter.dim() > 1 else parameter
    return network


def _unit_of_spikes(network: nn.Module) -> float:
    """What a spike stands for, of few-spikes neurons the last digit. Raises ValueError for a network without any."""
    first = next((layer for layer in network.modules() if isinstance(layer, FromRest)), None)
    if first is None:
        raise ValueError("only spiking networks can be in whole numbers")
    return first.last if isinstance(first, FewSpikes) else 1.0


def _integer_layer(name: str, layer: Convolution, unit: float, steps: int) -> Convolution:
    """The layer of this name in whole numbers, which reads multiples of the unit, or means of these over the steps."""
    if isinstance(layer, nn.ConvTranspose2d):
        result: Convolution = IntegerConvTranspose2d(layer, unit)
    elif name in PIXEL_INPUTS:
        result = IntegerPixelConv2d(layer)
    else:
        result = IntegerConv2d(layer, unit, steps)
    return one_hot(result) if getattr(layer, "one_hot", False) else result


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of this name."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, layer)
