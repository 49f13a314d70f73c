"""What a denoiser can be conditioned on: the prototype of an image, its label, both, or nothing."""

from collections.abc import Iterable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from models.labels import Labels
from models.prototypes import Prototypes
from models.quantizer import Codebook

NOT_GIVEN = -1
"""Stands in for an index where an image does not have the condition."""

INVERSE_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many there are


class Conditions:
    """The J conditions of a denoiser (J = 0, 1 or 2); the prototype, if any, comes before the label.

    The conditions of N images are int64 `[N,J]`: prototype index and label, either of which may be NOT_GIVEN.
    """

    def __init__(self, prototypes: Prototypes | None, labels: Labels | None):
        self.prototypes, self.labels = prototypes, labels
        self._parts = [part for part in (prototypes, labels) if part is not None]

    def __len__(self) -> int:
        return len(self._parts)

    def currents(self, conditions: Tensor) -> Tensor:
        """Conditions `[N,J]` to the sum of their currents, `[N,C,h/patch,w/patch]`."""
        parts = (module(indices) for module, indices in zip(self._parts, conditions.unbind(1), strict=True))
        return reduce(torch.add, parts)

    def of(self, codes: Tensor, labels: Tensor | None = None, *, codebook: Codebook) -> Tensor | None:
        """The conditions `[N,J]` of images with these `codes [N,h,w]` and `labels [N]`; None if J is 0.

        Raises ValueError if labels are a condition and none are passed.
        """
        return self._joined(self.prototypes.nearest(codes, codebook) if self.prototypes else None, labels)

    def fit(self, codes: Tensor, labels: Tensor | None, codebook: Codebook, seed: int) -> Tensor | None:
        """Fit prototypes and labels to the training images, whose conditions are returned; otherwise as `of`.

        Labels are fitted by counting how often they occur, with each prototype if there are any.
        """
        conditions = self._joined(self.prototypes.fit(codes, codebook, seed) if self.prototypes else None, labels)
        if self.labels and conditions is not None:
            self.labels.fit(conditions)
        return conditions

    def _joined(self, nearest: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Prototypes `[N]` and labels `[N]` to the conditions `[N,J]`; labels that are no condition are left out."""
        columns = [] if nearest is None else [nearest]
        if self.labels:
            if labels is None:
                raise ValueError("the denoiser is conditioned on labels, but none were passed")
            columns.append(labels.to(self.labels.counts.device))
        return torch.stack(columns, 1) if columns else None

    def of_samples(self, seed: int, samples: Iterable[int], labels: Iterable[int] | None = None) -> Tensor | None:
        """Conditions `[N,J]` for the samples with these indices; None if J is 0.

        Each sample takes the conditions of a training image, of all of them or, given `labels`, of those with its
        label. These are sorted by label and prototype, and sample i takes the one at the fraction `u + i/phi` modulo 1,
        with u drawn from `seed` and the golden ratio phi (a Kronecker sequence). So each image is equally likely, and
        any number of samples has the conditions nearly as often as they occur in training. What sample i takes depends
        only on `seed`, i and its label. Raises ValueError for a label that no training image has.
        """
        if not self:
            return None
        counts, samples = self._parts[-1].counts.cpu().numpy(), list(samples)
        wanted = [None] * len(samples) if labels is None else list(labels)
        ends = {label: _of_label(counts, label).T.cumsum() for label in set(wanted)}
        start = np.random.default_rng((seed, 0, 1)).random()
        drawn = []
        for sample, label in zip(samples, wanted, strict=True):
            image = int((start + INVERSE_GOLDEN_RATIO * sample) % 1 * ends[label][-1])
            drawn.append(ends[label].searchsorted(image, "right"))
        return torch.from_numpy(np.stack(np.unravel_index(drawn, counts.T.shape)[::-1], 1))

    def without_last(self, conditions: Tensor) -> Tensor:
        """The same conditions `[N,J]` with the last one dropped, which is the label if there is one."""
        return torch.cat((conditions[:, :-1], torch.full_like(conditions[:, -1:], NOT_GIVEN)), 1)


def _of_label(counts: np.ndarray, label: int | None) -> np.ndarray:
    """Counts `[L]` or `[G,L]`; given a label, those of all others are set to 0."""
    return counts if label is None else np.where(np.arange(counts.shape[-1]) == label, counts, 0)
