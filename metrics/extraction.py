"""Runs a feature network on many images, in batches."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Progress = Callable[[int], object]
"""Is told how many more images are done."""


@torch.inference_mode()
def extract(
    images: Tensor,
    function: Callable[[Tensor], Tensor],
    network: nn.Module,
    batch_size: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Apply `function` to images uint8 [N,C,H,W], C = 1 or 3, in batches: float32 [N,D].

    `function` receives batches as uint8 on the device of `network`, which is put into evaluation mode. Raises
    ValueError for other images.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"uint8 [N,1 or 3,H,W] expected, not {images.dtype} {list(images.shape)}")
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for batch in images.split(batch_size):
        parts.append(function(batch.to(device)).float().cpu())
        if progress:
            progress(len(batch))
    return torch.cat(parts).numpy()
