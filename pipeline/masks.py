"""Which pixels of an image are hidden, to be filled in."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from errors import UserError

# y and x, the position in the image from 0 to 1
MASKS = {
    "left": lambda y, x: x < 0.5,
    "right": lambda y, x: x >= 0.5,
    "top": lambda y, x: y < 0.5,
    "bottom": lambda y, x: y >= 0.5,
    "center": lambda y, x: (abs(y - 0.5) < 0.25) & (abs(x - 0.5) < 0.25),
}


def hidden_pixels(mask: str, height: int, width: int) -> Tensor:
    """Bool `[H,W]`: a mask of MASKS, or the bright pixels (128 and more) of a picture of this size.

    Raises UserError where `mask` is neither.
    """
    if mask in MASKS:
        y, x = (torch.arange(side).add(0.5) / side for side in (height, width))
        return MASKS[mask](y[:, None], x).expand(height, width)
    names = ", ".join(MASKS)
    if not Path(mask).is_file():
        raise UserError(f"--mask {mask} is no file: name one of {names}, or a picture that is white where to fill in")
    try:
        with Image.open(mask) as picture:
            hidden = torch.from_numpy(np.array(picture.convert("L")) >= 128)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"--mask {mask} is no picture that can be read: name another, or one of {names}") from error
    if hidden.shape != (height, width):
        shape = "x".join(map(str, reversed(hidden.shape)))
        raise UserError(f"--mask {mask} has {shape} pixels, the images have {width}x{height}: resize it")
    if not hidden.any():
        raise UserError(f"--mask {mask} has no white pixel: there is nothing to fill in")
    return hidden
