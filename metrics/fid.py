"""Fréchet Inception distance (Heusel et al. 2017)."""

from torch import Tensor, nn

from errors import UserError
from metrics.frechet import feature_statistics, frechet_distance
from metrics.inception import inception_features

# As many as there are features: with fewer, the covariance falls short of full rank by construction.
FEWEST_IMAGES = 2048


def fid(generated: Tensor, real: Tensor, inception: nn.Module, batch_size: int = 64) -> float:
    """FID between two sets of pictures, uint8 [N,C,H,W], with the network of `load_inception`; 0 is best.

    Raises UserError where a side has fewer than `FEWEST_IMAGES`.
    """
    check_enough(generated, real)
    generated_statistics, real_statistics = (
        feature_statistics(inception_features(images, inception, batch_size)) for images in (generated, real)
    )
    return frechet_distance(*generated_statistics, *real_statistics)


def check_enough(generated: Tensor, real: Tensor) -> None:
    """Raise UserError where FID would refuse, before any network is loaded or run."""
    for side, images in (("generated", generated), ("real", real)):
        if len(images) < FEWEST_IMAGES:
            raise UserError(f"FID needs at least {FEWEST_IMAGES} {side} images, not {len(images)}")
