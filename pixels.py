"""The one convention of pixels: uint8, 0 to 255, where images are kept; floats in [0,1] where networks compute."""

import torch
from torch import Tensor

WHITE = 255


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0,1] to uint8, rounded, of any shape."""
    return (images * WHITE).round().clamp(0, WHITE).byte()


def to_float(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Images uint8 to [0,1], of any shape, in the default float type or in `dtype`."""
    return images.to(dtype or torch.get_default_dtype()) / WHITE
