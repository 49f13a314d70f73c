"""Metrics from Inception's features and logits: FID, the paper's FID, KID and Inception score.

torchmetrics, which imports matplotlib, is imported when it is needed.
"""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from metrics.counts import check_enough
from metrics.frechet import feature_statistics, frechet_distance, frechet_distance_of_release

FID_IMAGES = 10_000  # generated, as is usual
FULL_RANK = 2048  # the number of features: with fewer images the covariance cannot have full rank
FEWEST_IMAGES = 129  # of a quick look: as many as the classifier's distance needs
PAPER_IMAGES = 1280  # generated, and as many real ones, in the paper
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SCORE_SPLITS, FEWEST_SCORED = 10, 1000


def fid(generated: np.ndarray, real: np.ndarray) -> float:
    """Fréchet Inception distance (Heusel et al. 2017) between `inception_features` [N,2048] and [M,2048]; 0 is best.

    The fewer images, the higher: published values are of `FID_IMAGES` or 50,000. Raises UserError if either set has
    fewer than `FEWEST_IMAGES`.
    """
    check_enough("FID", FEWEST_IMAGES, generated=generated, real=real)
    return frechet_distance(*feature_statistics(generated), *feature_statistics(real))


def paper_fid(generated: np.ndarray, real: np.ndarray) -> float:
    """FID as the paper's release computes it, from [N,2048] and [M,2048] features of `load_paper_inception`.

    It uses the first `PAPER_IMAGES` of each set and raises UserError if there are fewer. Its values are not comparable
    with any other FID.
    """
    check_enough("the paper's FID", PAPER_IMAGES, generated=generated, real=real)
    statistics = (feature_statistics(features[:PAPER_IMAGES]) for features in (generated, real))
    (mu1, sigma1), (mu2, sigma2) = statistics
    return frechet_distance_of_release(mu1, sigma1, mu2, sigma2)


def kid(generated: np.ndarray, real: np.ndarray, seed: int) -> tuple[float, float]:
    """Kernel Inception distance (Bińkowski et al. 2018) between `inception_features` [N,2048] and [M,2048].

    Mean and standard deviation of the unbiased squared MMD with the kernel (x·y/D + 1)³ over 100 pairs of random
    subsets of 1,000 images; `seed` determines the subsets. About 0 for equal distributions. Raises UserError if either
    set has fewer than 1,000 images.
    """
    check_enough("KID", KID_SUBSET_SIZE, generated=generated, real=real)
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(seed)

    def subset(features: np.ndarray) -> Tensor:
        return torch.from_numpy(features[torch.randperm(len(features), generator=generator)[:KID_SUBSET_SIZE].numpy()])

    values = torch.stack([poly_mmd(subset(real), subset(generated)) for _ in range(KID_SUBSETS)]).double()
    return values.mean().item(), values.std(unbiased=False).item()


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016) of generated images from their `inception_logits` [N,K]: 1 to K (best).

    Mean and standard deviation over 10 random splits of the images, the same at every call. Raises UserError for fewer
    than 1,000 images.
    """
    check_enough("the Inception score", FEWEST_SCORED, generated=logits)
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")
        torch.default_generator.manual_seed(0)
        score = InceptionScore(feature=nn.Identity(), splits=SCORE_SPLITS)
        score.update(torch.from_numpy(logits).double())
        mean, deviation = score.compute()
    return mean.item(), deviation.item()
