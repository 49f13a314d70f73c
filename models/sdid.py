"""SDID, the spiking diffusion image decoder: the denoiser of the codes (arXiv 2308.10187)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.denoiser import Denoiser
from models.neurons import LIF, Neuron
from models.spiking import (
    SpikingStack,
    apply_head,
    bias_of,
    convolve_at,
    full_precision,
    is_local,
    mean_weights,
    weighted_sum,
)


class SDID(Denoiser):
    """The paper's denoiser: five spiking blocks and a convolution to the logits. It takes no condition.

    Its input is two planes: the index of each token (the mask token is `codebook_size`) and the timestep, both as plain
    numbers without normalisation, as in the release.

    Args:
        codebook_size: number of codes K.
        spike_steps: S.
        denoiser_channels: channels of the first block; the others have 2, 4, 8 and 4 times as many.
        neuron: makes the neurons of a layer.
    """

    def __init__(
        self, codebook_size: int = 128, spike_steps: int = 16, denoiser_channels: int = 64, neuron: Neuron = LIF
    ):
        super().__init__(codebook_size, spike_steps)
        width = denoiser_channels

        def block(inputs: int, outputs: int) -> SpikingStack:
            return SpikingStack(nn.Conv2d(inputs, outputs, 3, padding=1), spike_steps=spike_steps, neuron=neuron)

        self.conv1 = block(2, width)
        self.conv2 = block(width, 2 * width)
        self.conv3 = block(2 * width, 4 * width)
        self.conv4 = block(4 * width, 8 * width)
        self.conv5 = block(8 * width, 4 * width)
        self.conv6 = nn.Sequential(nn.Conv2d(5 * width, codebook_size, 3, padding=1))

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """All options but `spike_steps`, inferred from its weights. Raises KeyError for those of another network."""
        return dict(codebook_size=len(weights["conv6.0.weight"]), denoiser_channels=len(weights["conv1.0.weight"]))

    @property
    def head(self) -> nn.Conv2d:
        """The last layer, a convolution without neurons."""
        return cast(nn.Conv2d, self.conv6[0])

    def _embed(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Spikes of the first block, `[S,N,C,h,w]`."""
        planes = torch.stack((tokens, t.view(-1, 1, 1).expand_as(tokens)), 1)  # [N,2,h,w]
        return self.conv1(planes.to(self.head.weight.dtype))

    def forward(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """See Denoiser."""
        self._check_condition(condition)
        mean = mean_weights(self.spike_steps, like=self.head.weight)
        first = self._embed(tokens, t)
        x = self.conv4(self.conv3(self.conv2(first)))

        def both(readout: Tensor | None) -> Tensor:
            last = self.conv5(x, readout)
            return torch.cat((last, first if readout is None else weighted_sum(readout, first)), -3)

        return apply_head(self.head, both, mean)

    def logits_at(self, tokens: Tensor, t: Tensor, where: Tensor, condition: Tensor | None = None) -> Tensor:
        """See Denoiser. Only what the P logits depend on is computed.

        A logit depends on 3x3 positions of the last hidden block, 5x5 of the one before, and so on. Features are kept
        as `[S, positions, C]`, and a convolution is a matrix product of gathered neighbours. With other layers in their
        place, everything is computed.
        """
        self._check_evaluation_mode()
        self._check_condition(condition)
        mean = mean_weights(self.spike_steps, like=self.head.weight)
        blocks = (self.conv2, self.conv3, self.conv4, self.conv5)
        if not is_local(self.head) or not all(block.is_local for block in blocks):
            return super().logits_at(tokens, t, where, condition)
        needed = [_dilate(where)]  # positions of conv5, then of conv4, and so on
        for _ in blocks[1:]:
            needed.append(_dilate(needed[-1]))
        first = self._embed(tokens, t).permute(0, 1, 3, 4, 2).flatten(1, 3)  # [S,N,C,h,w] -> [S,N*h*w,C]
        x, held = first, torch.ones_like(where)
        for block, wanted in zip(blocks, reversed(needed), strict=True):
            x = block.fire_at(x, _neighbours(held, wanted), mean if block is self.conv5 else None)
            held = wanted
        rate = weighted_sum(mean, first[:, held.flatten()])
        summed = torch.cat((x, rate), 1)[None]  # [1,positions,5C]
        with full_precision(summed):
            return convolve_at(self.head, summed, _neighbours(held, where))[0] + bias_of(self.head)


def _dilate(mask: Tensor) -> Tensor:
    """Also set the 3x3 neighbourhood of every position set: bool `[N,h,w]` to bool `[N,h,w]`."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def _neighbours(held: Tensor, wanted: Tensor) -> Tensor:
    """For each position set in `wanted [N,h,w]`, the rows of its 3x3 neighbours among those set in `held`: `[P,9]`.

    A neighbour outside the grid has the index one past the last row, which `convolve_at` treats as zeros.
    """
    rows = torch.where(held, held.flatten().cumsum(0).view_as(held) - 1, 0)
    padded = F.pad(rows, (1, 1, 1, 1), value=int(held.sum()))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [N,h,w,3,3]
    return windows[wanted].flatten(1)
