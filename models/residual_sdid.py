"""A residual spiking denoiser of the codes, an alternative to the paper's SDID (`--denoiser residual`)."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.denoiser import Denoiser
from models.labels import Labels
from models.neurons import LIF, Neuron
from models.prototypes import Prototypes
from models.spiking import BRANCH_SCALE, THRESHOLD_BIAS, Firing, apply_head, literal, mean_weights, one_hot, over_steps

MOST_POSITIONS = 64  # mixed by a matrix each
HEADS = 16  # groups of channels, each with its own mixing matrix


class MixingBlock(nn.Module):
    """Residual block on currents `[S,N,C,h,w]`: mixes positions, then channels. All its weights receive binary spikes.

    The residual stream carries real-valued currents (membrane shortcut, MS-ResNet, arXiv 2112.08954). A matrix for each
    of HEADS groups of channels mixes positions, and two 1x1 convolutions mix channels (MLP-Mixer, arXiv 2105.01601).
    """

    def __init__(self, width: int, positions: int, spike_steps: int, neuron: Neuron = LIF):
        super().__init__()
        self.fire_positions = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.mix = nn.Conv2d(HEADS * positions, HEADS * positions, 1, groups=HEADS, bias=False)
        self.fire_channels = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.fire_hidden = Firing(2 * width, spike_steps, THRESHOLD_BIAS, neuron)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        nn.init.normal_(self.mix.weight, std=BRANCH_SCALE * positions**-0.5)
        with torch.no_grad():
            self.project.weight.mul_(BRANCH_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Currents `[S,N,C,h,w]`, or `[N,C,h,w]` if they are the same at each spike step, to `[S,N,C,h,w]`."""
        x = x + self._mix_positions(self.fire_positions(x))
        hidden = over_steps(self.expand, self.fire_channels(x))
        return x + over_steps(self.project, self.fire_hidden(hidden))

    def _mix_positions(self, spikes: Tensor) -> Tensor:
        """Mix the positions of spikes `[S,N,C,h,w]`: a matrix product for each head.

        Equivalent to the grouped convolution `mix`, which runs instead where it is called as a module.
        """
        (steps, samples, channels), (height, width) = spikes.shape[:3], spikes.shape[3:]
        positions = height * width
        x = spikes.permute(0, 1, 3, 4, 2).reshape(steps * samples, positions, HEADS, -1)  # [S,N,C,h,w] -> [SN,P,H,C/H]
        if literal(self.mix):
            x = self.mix(x.transpose(1, 2).reshape(len(x), -1, 1, channels // HEADS))
            x = x.view(len(x), HEADS, positions, -1).transpose(1, 2)
        else:
            weight = self.mix.weight.permute(0, 2, 3, 1).reshape(HEADS, positions, positions).to(spikes.dtype)
            x = weight @ x.permute(2, 1, 0, 3).reshape(HEADS, positions, -1)
            x = x.view(HEADS, positions, steps * samples, -1).permute(2, 1, 0, 3)  # [SN,P,H,C/H]
        return x.reshape(steps, samples, height, width, channels).permute(0, 1, 4, 2, 3)


def smallest_patch(grid: tuple[int, int], sides: Sequence[int]) -> int:
    """The smallest of the `sides` of a patch that leaves at most MOST_POSITIONS, or else the largest that fits a grid.

    1 if none fits.
    """
    fitting = [patch for patch in sides if not any(side % patch for side in grid)]
    few = [patch for patch in fitting if math.prod(grid) <= MOST_POSITIONS * patch**2]
    return min(few, default=max(fitting, default=1))


class ResidualSDID(Denoiser):
    """A residual network of blocks of the class `MixingBlock`.

    Tokens enter as one-hot spikes over K + 1 channels. A strided convolution embeds each patch of tokens, together with
    the tokens around it, as currents of one position, to which learned position embeddings and the currents of the
    conditions are added. After the blocks, a linear layer maps mean firing rates to the logits of each patch. There is
    no timestep embedding: the number of masked tokens already indicates the timestep.

    Args:
        codebook_size: number of codes K.
        spike_steps: S.
        denoiser_channels: channels of all blocks, a multiple of HEADS. Raises ValueError if it is not.
        denoiser_blocks: number of blocks.
        prototypes: number of prototypes it can be conditioned on; they must be fitted (`Conditions.fit`). 0 for none.
        classes: number of classes whose labels it can be conditioned on; their counts must be fitted, too. 0 for none.
        grid: height and width of the grid of codes.
        patch: side of a patch of tokens, 1, 2 or 4; None: the smallest, but 1 only if a side is odd, of which there are
            at most MOST_POSITIONS, or else the largest that fits.
        margin: how many tokens around a patch are embedded with it: 1; 0 in older weights.
        neuron: makes the neurons of a layer.
    """

    def __init__(
        self,
        codebook_size: int = 128,
        spike_steps: int = 2,
        denoiser_channels: int = 192,
        denoiser_blocks: int = 4,
        prototypes: int = 0,
        classes: int = 0,
        grid: tuple[int, int] = (14, 14),
        patch: int | None = None,
        margin: int = 1,
        neuron: Neuron = LIF,
    ):
        super().__init__(codebook_size, spike_steps)
        width = denoiser_channels
        if width % HEADS:
            raise ValueError(f"denoiser_channels must be a multiple of {HEADS}, got {width}")
        patch = patch or smallest_patch(grid, (2, 4))
        height, columns = grid[0] // patch, grid[1] // patch
        self.patch, self.margin, side = patch, margin, patch + 2 * margin
        self.embed = one_hot(nn.Conv2d(codebook_size + 1, width, side, stride=patch, padding=margin, bias=False))
        if prototypes:
            self.prototypes = Prototypes(prototypes, codebook_size, width, patch, grid)
        if classes:
            self.labels = Labels(classes, width, (height, columns), prototypes)
        self.position = nn.Parameter(torch.randn(width, height, columns) / 2)
        blocks = (MixingBlock(width, height * columns, spike_steps, neuron) for _ in range(denoiser_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.fire = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.head = nn.Conv2d(width, patch**2 * codebook_size, 1)
        nn.init.normal_(self.embed.weight, std=1 / side)

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int | tuple[int, int]]:
        """All options but `spike_steps`, inferred from its weights. Raises KeyError for those of another network."""
        width, channels, side, _ = weights["embed.weight"].shape
        patch = next(patch for patch in (1, 2, 4) if side - patch in (0, 2))  # 4 always has a margin
        height, columns = weights["position"].shape[1:]
        blocks = sum(name.endswith(".mix.weight") for name in weights)
        prototypes = len(weights.get("prototypes.counts", ()))
        classes = len(weights.get("labels.embed.weight", ()))
        return dict(
            codebook_size=channels - 1,
            denoiser_channels=width,
            denoiser_blocks=blocks,
            prototypes=prototypes,
            classes=classes,
            grid=(patch * height, patch * columns),
            patch=patch,
            margin=(side - patch) // 2,
        )

    def load_pretrained(self, weights: dict[str, Tensor]) -> None:
        """Initialise from the weights of another denoiser, which may have other conditions.

        A condition that is missing from the weights keeps its initial zeros; one that this denoiser lacks is ignored.
        A margin that they lack begins with zeros. Prototypes and counts, which are fitted to the training images, are
        not loaded. Raises RuntimeError if anything else differs.
        """
        embed = weights.get("embed.weight", self.embed.weight)
        added = (self.embed.kernel_size[0] - embed.shape[-1]) // 2  # 1 if they are from before there was a margin
        weights = weights | {"embed.weight": F.pad(embed, 4 * (added,))}
        conditions, fitted = ("prototypes.", "labels."), (".grids", ".counts")
        own = {name: value for name, value in self.state_dict().items() if name.startswith(conditions)}
        found = {
            name: value
            for name, value in weights.items()
            if not name.startswith(conditions) or (name in own and not name.endswith(fitted))
        }
        self.load_state_dict(own | found)

    def forward(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """See Denoiser; `t` has no influence."""
        self._check_condition(condition)
        mean = mean_weights(self.spike_steps, like=self.head.weight)
        x = self._hidden(self._currents(tokens, condition))
        return F.pixel_shuffle(apply_head(self.head, partial(self.fire, x), mean), self.patch)

    def _hidden(self, currents: Tensor) -> Tensor:
        """The blocks: currents of `_currents` to those of the last layer, `[S,N,C,h/patch,w/patch]`."""
        x: Tensor = self.blocks(currents)
        return x

    def _currents(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """Currents of tokens, conditions and positions, the same at each spike step: `[N,C,h/patch,w/patch]`.

        `[S,N,C,h/patch,w/patch]` where a layer is called as a module.
        """
        spikes = F.one_hot(tokens.long(), self.codebook_size + 1).permute(0, 3, 1, 2).to(self.head.weight)

        def embedded() -> Tensor:
            currents = self.embed(spikes)
            return currents if condition is None else currents + self.conditions.currents(condition)

        embeds = [part.embed for part in (self, self.prototypes, self.labels) if part is not None]
        currents = torch.stack([embedded() for _ in range(self.spike_steps)]) if literal(*embeds) else embedded()
        return currents + self.position
