"""Which pixels of an image are hidden for inpainting, and which visible ones are next to them."""

import os

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from errors import UserError
from files import expand
from image_files import find_images, read_images
from parts import MASKS


def hidden_pixels(mask: str, height: int, width: int) -> Tensor:
    """Bool `[H,W]`: a mask of MASKS, or the bright pixels (128 and more) of an image file of this size.

    Transparent pixels count as black, so that a white brush on a transparent layer hides what it has painted. Raises
    UserError if `mask` is neither, and if it hides no pixel or all of them.
    """
    if mask in MASKS:
        y, x = (torch.arange(side).add(0.5) / side for side in (height, width))
        return MASKS[mask](y[:, None], x).expand(height, width)
    path, names = expand(mask), ", ".join(MASKS)
    if not os.path.isfile(path):
        raise UserError(f"--mask {mask} is not a file: name one of {names}, or an image that is white where to inpaint")
    masks = read_images(find_images(path), channels=1, behind=0)
    if len(masks) != 1:
        raise UserError(f"--mask {mask} holds {len(masks)} images: name a file with one, or one of {names}")
    brightness = masks[0, :, :, 0]
    hidden = torch.from_numpy(brightness >= 128)
    if hidden.shape != (height, width):
        shape = "x".join(map(str, reversed(hidden.shape)))
        raise UserError(f"--mask {mask} has {shape} pixels, the images have {width}x{height}: resize it")
    if not hidden.any():
        cause = f"--mask {mask} has no white pixel (the brightest has {brightness.max()} of 255, transparent ones 0)"
        raise UserError(f"{cause}: paint white what is to be inpainted")
    if hidden.all():
        raise UserError(f"--mask {mask} is all white: paint black, or leave transparent, what is to be kept")
    return hidden


def nearest_visible(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 `[H,W]` each, of the visible pixel nearest to each pixel, its own where it is visible.

    `hidden` is bool `[H,W]`. Where all pixels are hidden, these are of some pixel.
    """
    rows, columns = distance_transform_edt(hidden.numpy(), return_distances=False, return_indices=True)
    return torch.from_numpy(rows).long(), torch.from_numpy(columns).long()
