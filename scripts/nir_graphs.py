"""The networks in a form that NIR can represent: convolutions and SpikingJelly's neurons, for one spike step."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from errors import UserError
from models import SDID, ResidualSDID
from models.kernels.compiled import is_exactly
from models.neurons import IF, LIF, PLIF, SURROGATE
from models.residual_sdid import HEADS, MixingBlock
from models.spiking import Convolution, Firing, SpikingStack

Pair = tuple[int, int]


class SDIDGraph(nn.Module):
    """SDID for one spike step, planes `[N,2,h,w]` to `[N,K,h,w]`; two convolutions are summed instead of concatenating.

    The sum enters an identity with the head's bias, because the importer sums the inputs of a layer but not outputs.
    """

    what = "planes of tokens and timestep to logits; outside: mean over the steps"

    def __init__(self, denoiser: SDID):
        super().__init__()
        head, blocks = denoiser.head, (denoiser.conv2, denoiser.conv3, denoiser.conv4, denoiser.conv5)
        width = head.in_channels // 5
        parts = head.weight.split((4 * width, width), 1)
        self.first, self.rest = spiking_layers(denoiser.conv1), nn.Sequential(*map(spiking_layers, blocks))
        self.head_rest, self.head_first = (convolution(part, padding=head.padding) for part in parts)
        self.add = identity(head.out_channels, head.bias)

    def planes(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The graph's input for `tokens [N,h,w]` and timesteps `t [N]`."""
        return torch.stack((tokens, t.view(-1, 1, 1).expand_as(tokens)), 1).double()

    @staticmethod
    def logits(outputs: Tensor) -> Tensor:
        """Logits `[N,K,h,w]` from the graph's outputs `[S,N,K,h,w]`."""
        return outputs.mean(0)

    def forward(self, planes: Tensor) -> Tensor:
        """See the class."""
        first = self.first(planes)
        return self.add(self.head_rest(self.rest(first)) + self.head_first(first))


class ResidualGraph(nn.Module):
    """ResidualSDID for one spike step: spikes from `planes` to logits of patches, `[N,patch^2*K,h/patch,w/patch]`.

    Values that are summed or used twice pass through an identity, because the importer sums the inputs of a layer. The
    grid of codes must be square, as nir computes the sizes of other grids wrongly.
    """

    what = "planes of tokens, prototype, label and positions to logits; outside: mean over the steps, pixel shuffle"

    def __init__(self, denoiser: ResidualSDID):
        super().__init__()
        position, patch, conditions = denoiser.position, denoiser.patch, denoiser.conditions
        self.codebook_size, self.grid, self.conditions = denoiser.codebook_size, position.shape[1:], conditions
        self.corner = F.pad(torch.ones(1, 1), (0, patch - 1, 0, patch - 1))
        placed = [*(conditions.labels.embed.weight if conditions.labels else ()), position]  # each [C,h,w]
        patches = [conditions.prototypes.embed.weight] if conditions.prototypes else []
        patches += [each.flatten(1)[..., None, None] * self.corner for each in placed]
        weights = [denoiser.embed.weight, *(F.pad(each, 4 * (denoiser.margin,)) for each in patches)]
        self.enter = convolution(torch.cat(weights, 1), stride=denoiser.embed.stride, padding=denoiser.embed.padding)
        blocks = (MixingGraph(cast(MixingBlock, block), self.grid) for block in denoiser.blocks)
        self.blocks = nn.Sequential(*blocks)
        self.leave = nn.Sequential(*fired(identity(len(position)), denoiser.fire), layer(denoiser.head))

    def planes(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The graph's input: a plane for each token, for each code of a prototype, and for each position.

        The plane of a position has a single 1, in the corner of its patch; the response to it is the position's
        embedding. Each label also has a plane for each position, all of which are 0 unless the label is given.
        """
        planes = [F.one_hot(tokens, self.codebook_size + 1).permute(0, 3, 1, 2)]
        positions = torch.kron(torch.eye(self.grid.numel()).view(-1, *self.grid), self.corner)
        if self.conditions.prototypes:
            assert condition is not None
            codes = self.conditions.prototypes.grids[condition[:, 0]].long()
            planes.append(F.one_hot(codes, self.codebook_size).permute(0, 3, 1, 2))
        if self.conditions.labels:
            assert condition is not None
            labels = F.one_hot(condition[:, -1], self.conditions.labels.embed.in_channels)
            planes.append((labels[..., None, None, None] * positions).flatten(1, 2))
        planes.append(positions.expand(len(tokens), -1, -1, -1))
        return torch.cat(planes, 1).double()

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits `[N,K,h,w]` from the graph's outputs `[S,N,patch^2*K,h/patch,w/patch]`."""
        return F.pixel_shuffle(outputs.mean(0), len(self.corner))

    def forward(self, planes: Tensor) -> Tensor:
        """See the class."""
        return self.leave(self.blocks(self.enter(planes)))


class MixingGraph(nn.Module):
    """MixingBlock for one spike step, currents `[N,C,h,w]` to currents `[N,C,h,w]`.

    NIR has no node that permutes axes. So for each head, a convolution as large as the grid turns positions into
    channels and mixes them, and a second one turns them back. This is exact; nearly all of their weights are zero.
    """

    def __init__(self, block: MixingBlock, grid: torch.Size):
        super().__init__()
        width, positions = block.project.out_channels, grid.numel()
        share = torch.eye(width // HEADS, dtype=block.mix.weight.dtype)
        at = torch.eye(positions).view(positions, *grid)
        place = torch.einsum("cd,phw->cdphw", share, at.flip(1, 2)).flatten(1, 2)  # [C/H,C/H*P,h,w]
        mixers = block.mix.weight.view(HEADS, positions, *grid)
        gathers = torch.einsum("cd,mphw->mcpdhw", share, mixers).flatten(1, 2)  # [H,C/H*P,C/H,h,w]
        parts = torch.eye(width).chunk(HEADS)
        self.fire = nn.Sequential(*fired(identity(width), block.fire_positions))
        self.heads = nn.ModuleList(
            nn.Sequential(
                convolution(part[..., None, None]),
                convolution(gather),
                convolution(place, padding=tuple(side - 1 for side in grid)),
                convolution(part.T[..., None, None]),
            )
            for part, gather in zip(parts, gathers, strict=True)
        )
        self.mixed, self.out = identity(width), identity(width)
        hidden = fired(identity(width), block.fire_channels), fired(block.expand, block.fire_hidden)
        self.channels = nn.Sequential(*hidden[0], *hidden[1], layer(block.project))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        spikes = self.fire(x)
        for head in self.heads:
            x = x + head(spikes)
        x = self.mixed(x)
        return self.out(x + self.channels(x))


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


def identity(channels: int, bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution that is the identity, plus the bias `[C]` if there is one."""
    return convolution(torch.eye(channels)[..., None, None], bias)


def fired(conv: nn.Conv2d, firing: Firing) -> list[nn.Module]:
    """A convolution with the batch norm that follows it, and the neuron."""
    return [layer(conv, firing.norm), spiking_neuron(firing.lif)]


def spiking_neuron(layer: nn.Module) -> neuron.BaseNode:
    """The neuron as a class that SpikingJelly's exporter supports; a learned time constant has its last value.

    Raises UserError for one that NIR does not represent.
    """
    if not is_exactly(layer, LIF, IF, PLIF):
        raise UserError(f"NIR has no node for the neuron {type(layer).__name__}: this run cannot be exported")
    if layer.v_reset is None:
        raise UserError("NIR has no node for neurons with --v_reset soft: this run cannot be exported")
    values: dict[str, Any] = dict(v_threshold=layer.v_threshold, v_reset=layer.v_reset, surrogate_function=SURROGATE)
    if isinstance(layer, IF):
        return neuron.IFNode(**values)
    return neuron.LIFNode(1 / layer.w.sigmoid().item() if isinstance(layer, PLIF) else layer.tau, **values)


def coarse_weight(conv: nn.ConvTranspose2d, grain: int) -> Tensor:
    """Weights `[C'(grain*stride)^2, C*grain^2, 3, 3]` that do on a grid what `conv` does on one `grain` times finer.

    The channels of the coarse grid are the finer positions in the order of `pixel_unshuffle`; padding is 1. The weights
    are the responses to unit impulses.
    """
    channels = conv.in_channels * grain**2
    ones = torch.zeros(channels, channels, 3, 3, dtype=conv.weight.dtype)
    ones[range(channels), range(channels), 1, 1] = 1
    fine = F.pixel_shuffle(ones, grain)
    fine = F.conv_transpose2d(fine, conv.weight, None, conv.stride, cast(Pair, conv.padding), conv.output_padding)
    return F.pixel_unshuffle(fine, grain * conv.stride[0]).transpose(0, 1).flip(2, 3)


def layer(conv: Convolution, norm: nn.BatchNorm2d | None = None, grain: int = 1) -> nn.Conv2d:
    """A convolution or transposed convolution with its batch norm folded in; for `grain` see coarse_weight."""
    weight, stride, padding = conv.weight, conv.stride, conv.padding
    bias: Tensor = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    if isinstance(conv, nn.ConvTranspose2d):
        weight, stride, padding = coarse_weight(conv, grain), (1, 1), (1, 1)
    if norm is not None:
        assert norm.running_var is not None and norm.running_mean is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = (bias - norm.running_mean) * scale + norm.bias
        weight = weight * scale.repeat_interleave(len(weight) // len(scale)).view(-1, 1, 1, 1)
    return convolution(weight, bias.repeat_interleave(len(weight) // len(bias)), stride, padding)


def spiking_layers(stack: SpikingStack) -> nn.Sequential:
    """The stack for one spike step as convolutions and SpikingJelly's neurons; batch norm is folded in."""
    layers: list[nn.Module] = []
    grain = 1
    for conv, norm, neurons in stack.blocks:
        layers += [layer(conv, norm, grain), spiking_neuron(neurons)]
        grain *= conv.stride[0] if isinstance(conv, nn.ConvTranspose2d) else 1
    return nn.Sequential(*layers, *(() if stack.head is None else (layer(stack.head, None, grain),)))
