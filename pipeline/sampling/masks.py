"""Which pixels of an image are hidden for inpainting."""

import os

import torch
from torch import Tensor

from errors import UserError
from files import expand
from image_files import find_images, read_images
from parts import MASKS


def hidden_pixels(mask: str, height: int, width: int) -> Tensor:
    """Bool `[H,W]`: a mask of MASKS, or the bright pixels (128 and more) of an image file of this size.

    Raises UserError if `mask` is neither.
    """
    if mask in MASKS:
        y, x = (torch.arange(side).add(0.5) / side for side in (height, width))
        return MASKS[mask](y[:, None], x).expand(height, width)
    path, names = expand(mask), ", ".join(MASKS)
    if not os.path.isfile(path):
        raise UserError(f"--mask {mask} is not a file: name one of {names}, or an image that is white where to inpaint")
    masks = read_images(find_images(path), channels=1)
    if len(masks) != 1:
        raise UserError(f"--mask {mask} holds {len(masks)} images: name a file with one, or one of {names}")
    hidden = torch.from_numpy(masks[0, :, :, 0] >= 128)
    if hidden.shape != (height, width):
        shape = "x".join(map(str, reversed(hidden.shape)))
        raise UserError(f"--mask {mask} has {shape} pixels, the images have {width}x{height}: resize it")
    if not hidden.any():
        raise UserError(f"--mask {mask} has no white pixel: there is nothing to inpaint")
    return hidden
