"""A residual spiking denoiser of the codes: what `--denoiser residual` trains instead of the paper's SDID."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.prototypes import Prototypes
from models.spiking import Firing, apply_head

HEADS = 16  # groups of channels, each of which mixes positions in its own way
THRESHOLD_BIAS = 1.0  # of batch norm in front of neurons, whose threshold for the current of a single step is 2
BRANCH_SCALE = 0.3  # of the weights that end a residual branch, at the beginning


class MixingBlock(nn.Module):
    """Residual block on currents `[S,N,C,h,w]`: mixes positions, then channels. Its weights meet spikes alone.

    What is handed on and added to are real currents (membrane shortcut, arXiv 2112.08954). Positions are mixed by a
    matrix for each of HEADS groups of channels, channels by two 1x1 convolutions (after arXiv 2105.01601).
    """

    def __init__(self, width: int, positions: int, spike_steps: int):
        super().__init__()
        self.fire_positions = Firing(width, spike_steps, THRESHOLD_BIAS)
        self.mix = nn.Conv2d(HEADS * positions, HEADS * positions, 1, groups=HEADS, bias=False)
        self.fire_channels = Firing(width, spike_steps, THRESHOLD_BIAS)
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.fire_hidden = Firing(2 * width, spike_steps, THRESHOLD_BIAS)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        nn.init.normal_(self.mix.weight, std=BRANCH_SCALE * positions**-0.5)
        with torch.no_grad():
            self.project.weight.mul_(BRANCH_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Currents `[S,N,C,h,w]`, or `[N,C,h,w]` where they are the same at each spike step, to `[S,N,C,h,w]`."""
        x = x + self._mix_positions(self.fire_positions(x))
        hidden = self.expand(self.fire_channels(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.project(self.fire_hidden(hidden).flatten(0, 1)).unflatten(0, x.shape[:2])

    def _mix_positions(self, spikes: Tensor) -> Tensor:
        """A matrix product over the positions for each head. Written out it is `mix`, which runs in plain mode only."""
        (steps, samples, channels), (height, width) = spikes.shape[:3], spikes.shape[3:]
        positions = height * width
        x = spikes.permute(0, 1, 3, 4, 2).reshape(steps * samples, positions, HEADS, -1)  # [S,N,C,h,w] -> [SN,P,H,C/H]
        if self.fire_positions.plain:
            x = self.mix(x.transpose(1, 2).reshape(len(x), -1, 1, channels // HEADS))
            x = x.view(len(x), HEADS, positions, -1).transpose(1, 2)
        else:
            weight = self.mix.weight.permute(0, 2, 3, 1).reshape(HEADS, positions, positions).to(spikes.dtype)
            x = weight @ x.permute(2, 1, 0, 3).reshape(HEADS, positions, -1)
            x = x.view(HEADS, positions, steps * samples, -1).permute(2, 1, 0, 3)  # [SN,P,H,C/H]
        return x.reshape(steps, samples, height, width, channels).permute(0, 1, 4, 2, 3)


class ResidualSDID(nn.Module):
    """Predicts the codes from a partly masked grid.

    Tokens enter as spikes, one for each token among K + 1 channels, through a convolution that makes a square of
    tokens one position; positions have embeddings; the mean firing rate of the last currents goes through a linear
    layer to the logits of the square. There is no embedding of the timestep: which tokens are masked tells more.
    With `prototypes`, the currents of one are added to those of the tokens.

    Args:
        codebook_size: number of codes K.
        spike_steps: S.
        width: channels of all blocks, a multiple of HEADS. Raises ValueError if it is not.
        blocks: number of `MixingBlock`.
        prototypes: number of `Prototypes`, which are there after their `fit`; 0: none.
        grid: height and width of the grid of codes. Squares are 2x2, or single tokens where a side is odd.
    """

    def __init__(
        self,
        codebook_size: int = 128,
        spike_steps: int = 2,
        width: int = 192,
        blocks: int = 4,
        prototypes: int = 0,
        grid: tuple[int, int] = (14, 14),
    ):
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS}, got {width}")
        patch = 1 if any(side % 2 for side in grid) else 2
        height, columns = grid[0] // patch, grid[1] // patch
        self.codebook_size, self.spike_steps, self.patch, self.plain = codebook_size, spike_steps, patch, False
        self.embed = nn.Conv2d(codebook_size + 1, width, patch, stride=patch, bias=False)
        self.prototypes = Prototypes(prototypes, codebook_size, width, patch, grid) if prototypes else None
        self.position = nn.Parameter(torch.randn(width, height, columns) / 2)
        self.blocks = nn.Sequential(*(MixingBlock(width, height * columns, spike_steps) for _ in range(blocks)))
        self.fire = Firing(width, spike_steps, THRESHOLD_BIAS)
        self.head = nn.Conv2d(width, patch**2 * codebook_size, 1)
        nn.init.normal_(self.embed.weight, std=1 / patch)

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int | tuple[int, int]]:
        """All options but `spike_steps`, read off a model's weights. KeyError if they are of something else."""
        width, channels, patch, _ = weights["embed.weight"].shape
        height, columns = weights["position"].shape[1:]
        blocks = sum(name.endswith(".mix.weight") for name in weights)
        prototypes = len(weights.get("prototypes.counts", ()))
        grid = (patch * height, patch * columns)
        return dict(codebook_size=channels - 1, width=width, blocks=blocks, prototypes=prototypes, grid=grid)

    def take_over(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of a network that is like this one, prototypes aside; these stay to be fitted.

        Without weights for them, this network's prototypes have no influence yet. Raises RuntimeError if something else
        differs.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith("prototypes.")}
        found = {name: weights[name] for name in weights if name not in ("prototypes.grids", "prototypes.counts")}
        self.load_state_dict(own | found)

    def forward(self, tokens: Tensor, t: Tensor, prototype: Tensor | None = None) -> Tensor:
        """Tokens int `[N,h,w]` in 0..K (K = mask) to logits `[N,K,h,w]`; `t` has no influence.

        `prototype` int `[N]` is the number of each image's, or NO_PROTOTYPE, as all have without it.
        """
        mean = torch.full((self.spike_steps,), 1 / self.spike_steps, device=tokens.device).to(self.head.weight)
        spikes = F.one_hot(tokens.long(), self.codebook_size + 1).permute(0, 3, 1, 2).to(self.head.weight)
        if self.plain:
            spikes = spikes.expand(self.spike_steps, *spikes.shape)
            currents = self.embed(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        else:
            currents = self.embed(spikes)
        if prototype is not None:
            currents = currents + self._told(prototype)
        x = self.blocks(currents + self.position)
        x = self.fire(x) if self.plain else self.fire(x, mean)
        return F.pixel_shuffle(apply_head(self.head, x, mean), self.patch)

    def _told(self, prototype: Tensor) -> Tensor:
        """Currents of the prototypes, `[N,C,h/patch,w/patch]`, in plain mode `[S,N,C,h/patch,w/patch]`."""
        if self.plain:
            return torch.stack([self.prototypes(prototype) for _ in range(self.spike_steps)])
        return self.prototypes(prototype)

    def logits_at(self, tokens: Tensor, t: Tensor, where: Tensor, prototype: Tensor | None = None) -> Tensor:
        """`forward` at the P positions set in `where [N,h,w]`: `[P,K]`. All depend on the whole grid."""
        if self.training:
            raise RuntimeError("logits_at needs evaluation mode: a sample must not depend on its batch")
        return self(tokens, t, prototype).permute(0, 2, 3, 1)[where]
