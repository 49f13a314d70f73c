"""Images to features, a batch at a time: what all feature extractors share."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


@torch.inference_mode()
def extract(
    images: Tensor, function: Callable[[Tensor], Tensor], network: nn.Module, batch_size: int, title: str
) -> np.ndarray:
    """`function` of each batch, put together: float32 [N,D] for images uint8 [N,C,H,W] with C = 1 or 3.

    Batches come to `function` as uint8 on the device of `network`, which computes in evaluation mode. Raises
    ValueError for other images.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"uint8 [N,1 or 3,H,W] expected, not {images.dtype} {list(images.shape)}")
    network.eval()
    device = next(network.parameters()).device
    batches = tqdm(images.split(batch_size), desc=title, unit="batch", leave=False, disable=None)
    return torch.cat([function(batch.to(device)).float().cpu() for batch in batches]).numpy()
