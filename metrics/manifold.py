"""Precision, recall, density and coverage, from nearest neighbours in feature space."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.counts import check_enough

BLOCK = 1000  # rows of the distance matrix in memory at a time


class ManifoldMetrics(NamedTuple):
    """All in [0,1], except density, which may exceed 1; 1 is best."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(generated: np.ndarray, real: np.ndarray, neighbours: int = 5) -> ManifoldMetrics:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Features are [N,D] and [M,D]. The open ball of an image reaches to its k-th nearest neighbour in its own set, k =
    `neighbours`. Precision: fraction of the generated images that lie in the ball of a real one. Recall: fraction of
    the real images that lie in the ball of a generated one. Density: mean number of real images' balls that contain a
    generated image, divided by k. Coverage: fraction of the real images whose ball contains a generated one. Raises
    UserError unless both sets have more than k images.
    """
    check_enough("precision and recall", neighbours + 1, generated=generated, real=real)
    fake, true = (torch.from_numpy(features).double() for features in (generated, real))
    fake_radii, true_radii = _radii(fake, neighbours), _radii(true, neighbours)
    containing = torch.zeros(len(fake), dtype=torch.int64)  # number of real balls around each generated image
    recalled = covered = 0
    for rows, radii in zip(true.split(BLOCK), true_radii.split(BLOCK), strict=True):
        squared = squared_distances(rows, fake)  # [b,N]
        inside = squared < radii[:, None]
        containing += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((squared < fake_radii).any(1).sum())
    return ManifoldMetrics(
        precision=(containing > 0).double().mean().item(),
        recall=recalled / len(real),
        density=containing.double().mean().item() / neighbours,
        coverage=covered / len(real),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each of [N,D] to its k-th nearest neighbour: [N]."""
    # +1, as the nearest is the image itself
    return torch.cat(
        [squared_distances(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(BLOCK)]
    )


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """|x|² + |y|² - 2 x·y for all pairs of [b,D] and [N,D]: [b,N]."""
    squares = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return squares.addmm_(rows, columns.T, alpha=-2)
