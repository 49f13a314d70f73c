"""A spiking U-Net as denoiser of the codes (`--denoiser unet`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import LIF, Neuron
from models.residual_sdid import HEADS, MixingBlock, ResidualSDID, smallest_patch
from models.residual_svae import ConvolutionBlock
from models.spiking import THRESHOLD_BIAS, Firing, over_steps

SHARE = 3  # of the channels that the fine level has: one in SHARE


class UNetSDID(ResidualSDID):
    """The blocks of ResidualSDID between two convolution blocks at twice their resolution (U-Net, arXiv 1505.04597).

    Mixing all positions tells what the image shows, and convolutions how neighbouring tokens agree. Tokens, conditions
    and logits are those of the fine level; spikes go down to the coarse one by a strided convolution and up again by
    pixel shuffling, and the currents of the fine level are added to what comes up.

    Args:
        denoiser_channels: channels at the coarse level, a multiple of 48; the fine one has a third of them. Raises
            ValueError if it is not.
        grid: height and width of the grid of codes. Raises ValueError if a side is odd.
        patch: side of a patch of tokens at the fine level; None: the smallest that leaves at most MOST_POSITIONS of the
            coarse one.

    The others are those of ResidualSDID.
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
        neuron: Neuron = LIF,
    ):
        width, fine = denoiser_channels, denoiser_channels // SHARE
        if width % (SHARE * HEADS):
            raise ValueError(f"denoiser_channels must be a multiple of {SHARE * HEADS}, got {width}")
        patch = patch or smallest_patch((grid[0] // 2, grid[1] // 2), (1, 2, 4))
        if any(side % (2 * patch) for side in grid):
            sides = f"{grid[0]}x{grid[1]}"
            raise ValueError(f"downsampling must leave a grid of codes with even sides for a U-Net, got {sides}")
        height, columns = (side // (2 * patch) for side in grid)
        super().__init__(codebook_size, spike_steps, fine, 0, prototypes, classes, grid, patch, neuron=neuron)
        self.before = ConvolutionBlock(fine, spike_steps, neuron)
        self.fire_down = Firing(fine, spike_steps, THRESHOLD_BIAS, neuron)
        self.down = nn.Conv2d(fine, width, 2, stride=2, bias=False)
        self.coarse_position = nn.Parameter(torch.randn(width, height, columns) / 2)
        blocks = (MixingBlock(width, height * columns, spike_steps, neuron) for _ in range(denoiser_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.fire_up = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.up = nn.Conv2d(width, 4 * fine, 1, bias=False)
        self.after = ConvolutionBlock(fine, spike_steps, neuron)

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int | tuple[int, int]]:
        """See Denoiser."""
        options = ResidualSDID.options_of(weights)
        del options["margin"]
        return options | {"denoiser_channels": len(weights["down.weight"])}

    def _hidden(self, currents: Tensor) -> Tensor:
        """Through both levels; see ResidualSDID."""
        fine = self.before(currents)
        coarse = self.blocks(over_steps(self.down, self.fire_down(fine)) + self.coarse_position)
        return self.after(fine + F.pixel_shuffle(over_steps(self.up, self.fire_up(coarse)), 2))
