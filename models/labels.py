"""The class of an image as a condition of a denoiser."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spiking import one_hot


class Labels(nn.Module):
    """Conditions a denoiser on the label of an image, one of L classes.

    A label enters as a spike in one of L channels, at every spike step. A transposed convolution as large as the grid
    turns it into currents at every position; its weights are initially zero.

    The buffer `counts`, set by `fit`, is the number of training images of each label, int64 `[L]`, or, if the denoiser
    also has G prototypes, of each pair of prototype and label, `[G,L]`.

    Args:
        classes: number of classes L.
        channels: channels C of the output currents.
        grid: height and width (h, w) of the output currents.
        prototypes: number of prototypes G; 0 for none.
    """

    counts: Tensor

    def __init__(self, classes: int, channels: int, grid: tuple[int, int], prototypes: int = 0):
        super().__init__()
        shape = (prototypes, classes) if prototypes else (classes,)
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int64))
        self.embed = one_hot(nn.ConvTranspose2d(classes, channels, grid, bias=False))
        nn.init.zeros_(self.embed.weight)

    @property
    def present(self) -> list[int]:
        """The labels that occur among the training images."""
        return self.counts.view(-1, self.embed.in_channels).sum(0).nonzero().flatten().tolist()

    def forward(self, labels: Tensor) -> Tensor:
        """Labels `[N]` in 0..L-1, negative where none is given, to currents `[N,C,h,w]`; zeros for none."""
        spikes = F.one_hot(labels.clamp_min(0), self.embed.in_channels) * (labels >= 0).view(-1, 1)
        return self.embed(spikes[..., None, None].to(self.embed.weight))  # [N,L,1,1] -> [N,C,h,w]

    def fit(self, conditions: Tensor) -> None:
        """Count the training images with these conditions, `[N,1]` or `[N,2]`; see `Conditions`."""
        shape = tuple(self.counts.shape)
        numbers = np.ravel_multi_index(tuple(conditions.T.cpu().numpy()), shape)
        self.counts.copy_(torch.from_numpy(np.bincount(numbers, minlength=self.counts.numel()).reshape(shape)))
