"""MSE and SSIM between images and their reconstructions.

torchmetrics, which imports matplotlib, is imported when it is needed.
"""

from typing import cast

import torch
from torch import Tensor


def mse(images: Tensor, reconstructions: Tensor) -> float:
    """Mean squared error over all values of all images.

    Both are float [N,C,H,W] in [0,1]; raises ValueError if shapes or types differ.
    """
    _check_pair(images, reconstructions)
    return (images - reconstructions).square().mean(dtype=torch.float64).item()


def ssim(images: Tensor, reconstructions: Tensor, batch_size: int = 256) -> float:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window), the mean over images; 1 is best.

    Both are float [N,C,H,W] in [0,1]; raises ValueError if shapes or types differ. `batch_size` limits the memory and
    does not change the value.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, reconstructions)
    batches = zip(reconstructions.split(batch_size), images.split(batch_size), strict=True)
    per_image = [
        cast(Tensor, structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")).reshape(-1)
        for ours, theirs in batches
    ]
    return torch.cat(per_image).mean(dtype=torch.float64).item()


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape or images.dim() != 4 or not len(images):
        raise ValueError(
            f"two equal shapes [N,C,H,W] expected, not {list(images.shape)}, {list(reconstructions.shape)}"
        )
    if not (images.is_floating_point() and reconstructions.is_floating_point()):
        raise ValueError(f"floats in [0,1] expected, not {images.dtype} and {reconstructions.dtype}")
