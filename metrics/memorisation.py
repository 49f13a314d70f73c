"""Memorisation: whether samples lie nearer to the training images than unseen images do."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.counts import check_enough
from metrics.manifold import BLOCK, squared_distances


class Memorisation(NamedTuple):
    """Both in [0,1]; new images from the same distribution score 0.5, copies of training images 1.

    `nearer` also rises if samples are less diverse than real images; `nearest_is_training` does not.
    """

    nearer: float
    nearest_is_training: float


def memorisation(generated: np.ndarray, training: np.ndarray, unseen: np.ndarray) -> Memorisation:
    """Compare samples with training images and with unseen images by their features [N,D], [M,D] and [U,D].

    `nearer`: fraction of the pairs of a sample and an unseen image in which the sample is nearer to its nearest
    training image than the unseen image is to its own; ties count half (Meehan et al. 2020, arXiv 2004.05675).
    `nearest_is_training`: fraction of the samples that are nearer to one of min(M,U) training images, evenly spaced in
    the split, than to any of as many unseen ones. Raises UserError if a set is empty.
    """
    check_enough("memorisation", 1, generated=generated, training=training, unseen=unseen)
    samples, seen, new = (torch.from_numpy(features).double() for features in (generated, training, unseen))
    from_samples, from_unseen = nearest_distances(samples, seen), nearest_distances(new, seen).sort().values
    farther = len(new) - torch.searchsorted(from_unseen, from_samples, right=True)
    as_far = len(new) - torch.searchsorted(from_unseen, from_samples) - farther
    count = min(len(seen), len(new))
    to_training, to_unseen = (nearest_distances(samples, _spread(each, count)) for each in (seen, new))
    return Memorisation(
        nearer=(farther + as_far / 2).double().mean().item() / len(new),
        nearest_is_training=(to_training < to_unseen).double().mean().item(),
    )


def nearest_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distance of each of [N,D] to the nearest of [M,D]: [N]."""
    return torch.cat([squared_distances(part, columns).amin(1) for part in rows.split(BLOCK)])


def _spread(features: Tensor, count: int) -> Tensor:
    """`count` evenly spaced rows of [M,D]: [count,D]."""
    return features[torch.arange(count) * len(features) // count]
