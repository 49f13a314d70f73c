"""The networks in a form that NIR can represent: convolutions and SpikingJelly's neurons, for one spike step.

A graph has a single grid: what is finer has more channels instead, in the order of `pixel_unshuffle`. NIR sums what
enters a node. So a sum that leaves a graph, or that is used several times, passes through an identity; otherwise each
of its terms would enter each of the nodes that use it.
"""

from functools import partial, reduce
from operator import add
from typing import Any, cast

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from errors import UserError
from models import SDID, ResidualSDID, UNetSDID
from models.integer_layers import FINEST_SCALE, UNIT, IntegerConv2d
from models.integer_neurons import IntegerFewSpikes, IntegerLIF, affine
from models.kernels.compiled import is_exactly
from models.neurons import IF, LIF, PLIF, SURROGATE, FewSpikes
from models.residual_sdid import HEADS, MixingBlock
from models.residual_svae import SIDE, ConvolutionBlock, ResidualDecoder, ResidualEncoder
from models.spiking import Convolution, SpikingStack

Pair = tuple[int, int]

Spikes = list[Tensor]
"""Spikes `[N,C,h,w]` for each digit of the numbers that are sent; a single tensor if none are, or of pixels."""

Values = tuple[float, ...]
"""What a spike of each digit stands for."""

AS_IT_IS: Values = (1.0,)

Affine = tuple[Tensor, Tensor]
"""Gain and shift of each channel, `[C]`."""

TOGETHER = 4  # channels whose positions are mixed by one convolution, at most; more make fewer nodes, and more zeros


class Weighed(nn.Module):
    """A convolution of spikes, in which each digit counts as much as it stands for."""

    def __init__(self, conv: nn.Conv2d, values: Values):
        super().__init__()
        shape, biases = (conv.stride, conv.padding), (conv.bias, *[None] * (len(values) - 1))
        parts = (convolution(conv.weight * value, bias, *shape) for value, bias in zip(values, biases, strict=True))
        self.digits, self.width = nn.ModuleList(parts), conv.out_channels

    def forward(self, spikes: Spikes) -> Tensor:
        """Spikes to currents `[N,C',h,w]`."""
        return reduce(add, [conv(each) for conv, each in zip(self.digits, spikes, strict=True)])


class Fired(nn.Module):
    """A convolution, batch norm and neurons: spikes to spikes.

    Few-spikes neurons are IF neurons, a layer of them for each digit, all within the one spike step that their networks
    have. The first fire if the current, divided by what their spikes stand for, is at least 1. Spikes are subtracted
    from it, and the rest, doubled, is the current of the next.

    Attributes:
        sent: what its spikes stand for.
    """

    def __init__(
        self, conv: Convolution, norm: nn.Module, neurons: nn.Module, values: Values = AS_IT_IS, grain: int = 1
    ):
        super().__init__()
        self.enter = Weighed(layer(conv, entering(norm, neurons), grain), values)
        self.sent, width = values_of(neurons), self.enter.width
        self.neurons = nn.ModuleList(spiking_neuron(neurons) for _ in self.sent)
        self.taken = nn.ModuleList(identity(width, -1) for _ in self.sent[1:])
        self.doubled = nn.ModuleList(identity(width, 2) for _ in self.sent[1:])

    def forward(self, spikes: Spikes) -> Spikes:
        """See the class."""
        first, *others = self.neurons
        currents = self.enter(spikes)
        sent = [first(currents)]
        for neurons, taken, doubled in zip(others, self.taken, self.doubled, strict=True):
            currents = doubled(currents + taken(sent[-1]))
            sent.append(neurons(currents))
        return sent


class Branch(nn.Module):
    """Batch norm and neurons of a `Firing`, and a convolution of their spikes: currents `[N,C,h,w]` to currents."""

    def __init__(self, firing: nn.Module, conv: Convolution, grain: int = 1):
        super().__init__()
        self.fire = fired(identity(conv.in_channels), firing, grain=grain)
        self.weigh = Weighed(layer(conv, None, grain), self.fire.sent)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.weigh(self.fire([x]))


def fired(conv: Convolution, firing: nn.Module, values: Values = AS_IT_IS, grain: int = 1) -> Fired:
    """A convolution with the batch norm and the neurons of a `Firing`, which may be in whole numbers."""
    return Fired(conv, getattr(firing, "norm", nn.Identity()), cast(nn.Module, firing.lif), values, grain)


def values_of(neurons: nn.Module) -> Values:
    """What the spikes of neurons stand for."""
    if isinstance(neurons, FewSpikes):
        return tuple(neurons.last * 2**place for place in reversed(range(neurons.digits)))
    return AS_IT_IS


class StackGraph(nn.Module):
    """SpikingStack: `[N,C,h,w]` to its last spikes or numbers, or to the currents of its head."""

    def __init__(self, stack: SpikingStack):
        super().__init__()
        blocks: list[Fired] = []
        values, grain = AS_IT_IS, 1
        for conv, norm, neurons in stack.blocks:
            blocks.append(Fired(conv if blocks else first_layer(conv), norm, neurons, values, grain))
            values = blocks[-1].sent
            grain *= conv.stride[0] if isinstance(conv, nn.ConvTranspose2d) else 1
        self.blocks = nn.ModuleList(blocks)
        head = identity(blocks[-1].enter.width) if stack.head is None else layer(stack.head, None, grain)
        self.leave, self.out = Weighed(head, values), identity(head.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        spikes = [x]
        for block in self.blocks:
            spikes = block(spikes)
        return self.out(self.leave(spikes))


class SDIDGraph(nn.Module):
    """SDID: planes `[N,2,h,w]` to `[N,K,h,w]`. Two convolutions are summed, where it concatenates their inputs."""

    what = "planes of tokens and timestep to logits; outside: mean over the steps"

    def __init__(self, denoiser: SDID):
        super().__init__()
        head, stacks = denoiser.head, (denoiser.conv1, denoiser.conv2, denoiser.conv3, denoiser.conv4, denoiser.conv5)
        blocks: list[Fired] = []
        for stack in stacks:
            ((conv, norm, neurons),) = stack.blocks
            values = blocks[-1].sent if blocks else AS_IT_IS
            blocks.append(Fired(conv if blocks else first_layer(conv), norm, neurons, values))
        width = head.in_channels // 5
        self.first, self.rest = blocks[0], nn.ModuleList(blocks[1:])
        self.given = partial(given, denoiser.conv1.blocks[0][0])
        rest, first = (convolution(part, padding=head.padding) for part in head.weight.split((4 * width, width), 1))
        self.head_rest, self.head_first = Weighed(rest, values), Weighed(first, values)
        self.out = convolution(torch.eye(head.out_channels)[..., None, None], head.bias)

    def planes(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The graph's input for `tokens [N,h,w]` and timesteps `t [N]`."""
        return self.given(torch.stack((tokens, t.view(-1, 1, 1).expand_as(tokens)), 1).double())

    @staticmethod
    def logits(outputs: Tensor) -> Tensor:
        """Logits `[N,K,h,w]` from the graph's outputs `[S,N,K,h,w]`."""
        return outputs.mean(0)

    def forward(self, planes: Tensor) -> Tensor:
        """See the class."""
        first = spikes = self.first([planes])
        for block in self.rest:
            spikes = block(spikes)
        return self.out(self.head_rest(spikes) + self.head_first(first))


class ResidualGraph(nn.Module):
    """ResidualSDID or UNetSDID: spikes from `planes` to logits, `[N,side^2*K,h/side,w/side]`.

    A position of the graph's grid stands for a square of tokens. The grid of codes must be square, as nir computes the
    sizes of other grids wrongly.
    """

    what = "planes of tokens, prototype, label and positions to logits; outside: mean over the steps, pixel shuffle"

    def __init__(self, denoiser: ResidualSDID):
        super().__init__()
        grain = 2 if isinstance(denoiser, UNetSDID) else 1
        position = F.pixel_unshuffle(denoiser.position, grain)  # [C,h,w]
        self.codebook_size, self.conditions, self.grid = denoiser.codebook_size, denoiser.conditions, position.shape[1:]
        self.grain, self.patch, self.side = grain, denoiser.patch, grain * denoiser.patch
        labels, prototypes = self.conditions.labels, self.conditions.prototypes
        tokens = [coarse_weight(each.embed, self.side) for each in (denoiser, prototypes) if each is not None]
        placed = [*(F.pixel_unshuffle(labels.embed.weight, grain) if labels else ()), position]  # each [C,h,w]
        positions = [F.pad(each.flatten(1)[..., None, None], (1, 1, 1, 1)) for each in placed]
        self.enter = convolution(torch.cat([*tokens, *positions], 1), padding=(1, 1))
        blocks: list[nn.Module] = [MixingGraph(cast(MixingBlock, block), self.grid) for block in denoiser.blocks]
        if isinstance(denoiser, UNetSDID):
            blocks = [CoarseGraph(denoiser, blocks, self.enter.in_channels)]
            blocks = [ConvolutionGraph(denoiser.before, grain), *blocks, ConvolutionGraph(denoiser.after, grain)]
        self.blocks = nn.ModuleList(blocks)
        self.leave = Branch(denoiser.fire, denoiser.head, grain)
        self.out = identity(denoiser.head.out_channels * grain**2)

    def planes(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The graph's input: a plane for each token, for each code of a prototype, and for each position.

        Each of the first two kinds is one for each token of a square. The plane of a position has a single 1, there;
        the response to it is the position's embedding. Each label also has a plane for each position, all of which are
        0 unless the label is given.
        """

        def one_hot(codes: Tensor, count: int) -> Tensor:
            return F.pixel_unshuffle(F.one_hot(codes.long(), count).permute(0, 3, 1, 2), self.side)

        planes = [one_hot(tokens, self.codebook_size + 1)]
        positions = torch.eye(self.grid.numel(), dtype=torch.int64).view(-1, *self.grid)
        if self.conditions.prototypes:
            assert condition is not None
            planes.append(one_hot(self.conditions.prototypes.grids[condition[:, 0]], self.codebook_size))
        if self.conditions.labels:
            assert condition is not None
            labels = F.one_hot(condition[:, -1], self.conditions.labels.embed.in_channels)
            planes.append((labels[..., None, None, None] * positions).flatten(1, 2))
        planes.append(positions.expand(len(tokens), -1, -1, -1))
        return torch.cat(planes, 1).double()

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits `[N,K,h,w]` from the graph's outputs `[S,N,side^2*K,h/side,w/side]`."""
        return F.pixel_shuffle(F.pixel_shuffle(outputs.mean(0), self.grain), self.patch)

    def forward(self, planes: Tensor) -> Tensor:
        """See the class."""
        x = self.enter(planes)
        for block in self.blocks:
            x = block(x, planes) if isinstance(block, CoarseGraph) else block(x)
        return self.out(self.leave(x))


class CoarseGraph(nn.Module):
    """What UNetSDID does at its coarse level, added to the currents of the fine one."""

    def __init__(self, denoiser: UNetSDID, blocks: list[nn.Module], planes: int):
        super().__init__()
        self.down, self.blocks = Branch(denoiser.fire_down, denoiser.down, 2), nn.Sequential(*blocks)
        position = denoiser.coarse_position.flatten(1)
        self.place = convolution(F.pad(position, (planes - position.shape[1], 0))[..., None, None])
        self.up = Branch(denoiser.fire_up, denoiser.up)
        self.joined, self.out = identity(position.shape[0]), identity(denoiser.up.out_channels)

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        """Currents `[N,4C,h,w]`, and the graph's input, to currents `[N,4C,h,w]`."""
        return self.out(x + self.up(self.blocks(self.joined(self.down(x) + self.place(planes)))))


class MixingGraph(nn.Module):
    """MixingBlock: currents `[N,C,h,w]` to currents `[N,C,h,w]`.

    NIR has no node that permutes axes. So for a few channels of a head, a convolution as large as the grid turns
    positions into channels and mixes them, and a second one turns them back. This is exact; most of their weights are
    zero.
    """

    def __init__(self, block: MixingBlock, grid: torch.Size):
        super().__init__()
        width, positions, dtype = block.project.out_channels, grid.numel(), block.mix.weight.dtype
        together = max(size for size in range(1, TOGETHER + 1) if width // HEADS % size == 0)
        share, at = torch.eye(together, dtype=dtype), torch.eye(positions, dtype=dtype).view(positions, *grid)
        place = torch.einsum("cd,phw->cdphw", share, at.flip(1, 2)).flatten(1, 2)  # [c,cP,h,w]
        mixers = block.mix.weight.view(HEADS, positions, *grid)
        gathers = torch.einsum("cd,mphw->mcpdhw", share, mixers).flatten(1, 2)  # [H,cP,c,h,w]
        parts = torch.eye(width, dtype=dtype).split(together)
        self.sent = nn.Sequential(Branch(block.fire_positions, identity(width)), identity(width))
        self.mixers = nn.ModuleList(
            nn.Sequential(
                convolution(part[..., None, None]),
                convolution(gather),
                convolution(place, padding=tuple(side - 1 for side in grid)),
                convolution(part.T[..., None, None]),
            )
            for part, gather in zip(parts, gathers.repeat_interleave(len(parts) // HEADS, 0), strict=True)
        )
        self.mixed, self.out = identity(width), identity(width)
        self.fire_channels = fired(identity(width), block.fire_channels)
        self.fire_hidden = fired(block.expand, block.fire_hidden, self.fire_channels.sent)
        self.project = Weighed(layer(block.project), self.fire_hidden.sent)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        sent = self.sent(x)
        for mixer in self.mixers:
            x = x + mixer(sent)
        x = self.mixed(x)
        return self.out(x + self.project(self.fire_hidden(self.fire_channels([x]))))


class ConvolutionGraph(nn.Module):
    """ConvolutionBlock on a grid `grain` times coarser: currents to currents, `[N,C*grain^2,h,w]`."""

    def __init__(self, block: ConvolutionBlock, grain: int):
        super().__init__()
        self.fire_first = fired(identity(block.first.in_channels), block.fire_first, grain=grain)
        self.fire_second = fired(block.first, block.fire_second, self.fire_first.sent, grain)
        self.second = Weighed(layer(block.second, None, grain), self.fire_second.sent)
        self.out = identity(self.second.width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.out(x + self.second(self.fire_second(self.fire_first([x]))))


def convolution_graphs(blocks: nn.Sequential, grain: int = 1) -> list[ConvolutionGraph]:
    """Each ConvolutionBlock as a graph."""
    return [ConvolutionGraph(cast(ConvolutionBlock, block), grain) for block in blocks]


def encoder_graph(encoder: ResidualEncoder) -> nn.Sequential:
    """ResidualEncoder up to its last neurons: pixels `[N,C,H,W]` to the currents of its head, `[N,4,h,w]`."""
    layers: list[nn.Module] = [layer(first_layer(encoder.embed)), *convolution_graphs(encoder.fine)]
    if encoder.levels == 2:
        layers += [Branch(encoder.fire_down, encoder.down), *convolution_graphs(encoder.coarse)]
    return nn.Sequential(*layers, Branch(encoder.fire, encoder.head), identity(SIDE**2))


def codes_graph(firing: nn.Module) -> nn.Sequential:
    """The last neurons of ResidualEncoder: mean currents `[N,4,h,w]` to the numbers that they send."""
    return nn.Sequential(Branch(firing, identity(SIDE**2)), identity(SIDE**2))


def decoder_graph(decoder: ResidualDecoder) -> nn.Sequential:
    """ResidualDecoder: numbers `[N,4,h,w]` to the currents of its head, `[N,4C*levels^2,h,w]`."""
    layers: list[nn.Module] = [layer(first_layer(decoder.embed))]
    grain = decoder.levels
    if decoder.levels == 2:
        layers += [*convolution_graphs(decoder.coarse), Branch(decoder.fire_up, decoder.up)]
    layers += [*convolution_graphs(decoder.fine, grain), Branch(decoder.fire, decoder.head, grain)]
    return nn.Sequential(*layers, identity(decoder.head.out_channels * grain**2))


def convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
) -> nn.Conv2d:
    """A convolution in float64 with the weights `[C',C,k,k]` and the bias `[C']`, by default 0."""
    outputs, inputs, height, width = weight.shape
    sizes = cast(Pair, stride), cast(Pair, padding)
    conv = nn.Conv2d(inputs, outputs, (height, width), *sizes, dtype=torch.float64)
    conv.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias})
    return conv


def identity(channels: int, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that is the identity, times a scale."""
    return convolution(scale * torch.eye(channels)[..., None, None])


def spiking_neuron(layer: nn.Module) -> neuron.BaseNode:
    """The neuron as a class that SpikingJelly's exporter supports; a learned time constant has its last value.

    Raises UserError for one that NIR does not represent.
    """
    if is_exactly(layer, FewSpikes, IntegerFewSpikes) or (is_exactly(layer, IntegerLIF) and not layer.leaks):
        return neuron.IFNode(v_threshold=1.0, v_reset=0.0, surrogate_function=SURROGATE)
    if is_exactly(layer, IntegerLIF):
        raise UserError("NIR has no node for LIF neurons in whole numbers: export the run that was packed")
    if not is_exactly(layer, LIF, IF, PLIF):
        raise UserError(f"NIR has no node for the neuron {type(layer).__name__}: this run cannot be exported")
    if layer.v_reset is None:
        raise UserError("NIR has no node for neurons with --v_reset soft: this run cannot be exported")
    values: dict[str, Any] = dict(v_threshold=layer.v_threshold, v_reset=layer.v_reset, surrogate_function=SURROGATE)
    if isinstance(layer, IF):
        return neuron.IFNode(**values)
    return neuron.LIFNode(1 / layer.w.sigmoid().item() if isinstance(layer, PLIF) else layer.tau, **values)


def entering(norm: nn.Module, neurons: nn.Module) -> Affine:
    """What a `spiking_neuron` must be given instead of a current, as `gain * current + shift`.

    The thresholds of whole numbers are between two multiples of UNIT here, so that rounding decides nothing.
    """
    if isinstance(neurons, IntegerFewSpikes):
        gain = neurons.last / neurons.step_between.double() / values_of(neurons)[0]
        return gain, gain * neurons.offset + gain.abs() * (UNIT / 2)
    if isinstance(neurons, IntegerLIF):
        gain = neurons.threshold.sign() / (neurons.threshold.double().abs() - UNIT / 2)
        return gain, gain.abs() * neurons.offset
    gain, shift = affine(cast(nn.BatchNorm2d, norm))
    if isinstance(neurons, FewSpikes):
        first = values_of(neurons)[0]
        return gain / first, (shift + neurons.last / 2) / first
    return gain, shift


def coarse_weight(conv: Convolution, grain: int) -> Tensor:
    """Weights `[C'G^2,C*grain^2,3,3]` that do on a grid what `conv` does on one `grain` times finer; padding is 1.

    G is how many times finer its output is. The channels of the coarse grid are the finer positions in the order of
    `pixel_unshuffle`. The weights are the responses to unit impulses.
    """
    channels, modes = conv.in_channels * grain**2, (conv.stride, cast(Pair, conv.padding))
    ones = torch.zeros(channels, channels, 3, 3, dtype=conv.weight.dtype)
    ones[range(channels), range(channels), 1, 1] = 1
    fine = F.pixel_shuffle(ones, grain)
    if isinstance(conv, nn.ConvTranspose2d):
        fine = F.conv_transpose2d(fine, conv.weight, None, *modes, conv.output_padding)
    else:
        fine = F.conv2d(fine, conv.weight, None, *modes)
    return F.pixel_unshuffle(fine, fine.shape[-1] // 3).transpose(0, 1).flip(2, 3)


def layer(conv: Convolution, fold: Affine | None = None, grain: int = 1) -> nn.Conv2d:
    """A convolution or transposed convolution with what follows it folded in; for `grain` see coarse_weight.

    Raises UserError for one that rounds.
    """
    if rounds(conv):
        raise UserError("NIR has no node that rounds, as layers in whole numbers do with more than 4 --digits")
    weight, stride, padding = conv.weight, conv.stride, cast(Pair, conv.padding)
    bias: Tensor = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    if isinstance(conv, nn.ConvTranspose2d) or grain > 1:
        weight, stride, padding = coarse_weight(conv, grain), (1, 1), (1, 1)
        if not (weight.abs().sum((0, 1)) * (torch.arange(9).view(3, 3) != 4)).any():
            weight, padding = weight[..., 1:2, 1:2], (0, 0)
    if fold is not None:
        gain, shift = fold
        bias, weight = bias * gain + shift, weight * repeated(gain, len(weight)).view(-1, 1, 1, 1)
    return convolution(weight, repeated(bias, len(weight)), stride, padding)


def rounds(conv: Convolution) -> bool:
    """Whether a layer in whole numbers rounds its currents, because what it receives is finer than its unit."""
    return isinstance(conv, IntegerConv2d) and conv.unit * FINEST_SCALE < UNIT


def first_layer(conv: Convolution) -> Convolution:
    """The layer with which a graph begins: one that rounds is outside, and the graph is given its currents."""
    return identity(conv.out_channels) if rounds(conv) else conv


def given(conv: Convolution, x: Tensor) -> Tensor:
    """What a graph with this `first_layer` is given for its input, which may be counts."""
    if rounds(conv):
        return cast(Tensor, conv(x)).double()
    return x.double() * cast(float, conv.unit) if x.dtype == torch.uint8 else x.double()


def repeated(values: Tensor, channels: int) -> Tensor:
    """Values of channels `[C]` for each channel that stands for one of them, `[channels]`."""
    return values.repeat_interleave(channels // len(values))
