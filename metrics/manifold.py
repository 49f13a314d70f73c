"""Precision, recall, density and coverage: which share of one set lies where the other set is."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.counts import check_enough

BLOCK = 1000  # rows of the matrix of distances that are in memory at a time


class ManifoldFigures(NamedTuple):
    """Shares in [0,1], except for density, which may exceed 1; 1 is best."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_figures(generated: np.ndarray, real: np.ndarray, neighbours: int = 5) -> ManifoldFigures:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Features are [N,D] and [M,D]. The ball of an image reaches to its k-th nearest neighbour in its own set, exclusive,
    k being `neighbours`. Precision: generated images in a ball of a real one. Recall: real images in a ball of a
    generated one. Density: balls of real images around a generated one, over k. Coverage: real images with a
    generated one in their ball. Raises UserError where a side has not more than k images.
    """
    check_enough("precision and recall", neighbours + 1, generated=generated, real=real)
    generated, real = (torch.from_numpy(features).double() for features in (generated, real))
    generated_radii, real_radii = _radii(generated, neighbours), _radii(real, neighbours)
    around = torch.zeros(len(generated), dtype=torch.int64)  # balls of real images around each generated one
    recalled = covered = 0
    for rows, radii in zip(real.split(BLOCK), real_radii.split(BLOCK), strict=True):
        squared = _squared_distances(rows, generated)  # [b,N]
        inside = squared < radii[:, None]
        around += inside.sum(0)
        covered += inside.any(1).sum().item()
        recalled += (squared < generated_radii).any(1).sum().item()
    return ManifoldFigures(
        precision=(around > 0).double().mean().item(),
        recall=recalled / len(real),
        density=around.double().mean().item() / neighbours,
        coverage=covered / len(real),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each of [N,D] to its k-th nearest neighbour: [N]."""
    # +1, as each is the nearest to itself
    return torch.cat(
        [_squared_distances(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(BLOCK)]
    )


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """|x|² + |y|² - 2 x·y for all pairs of [b,D] and [N,D]: [b,N]."""
    squares = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return squares.addmm_(rows, columns.T, alpha=-2)
