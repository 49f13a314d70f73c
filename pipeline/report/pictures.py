"""Images and animations as embedded in the page: PNG data URIs, scaled down so that the page stays small."""

import base64
import io
from typing import NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.sampling.grids import encode_png, grid
from pixels import to_float, to_uint8

THUMBNAIL = 64  # largest side of an image in the page, in pixels
GRID_WIDTH, ANIMATION_WIDTH = 720, 320  # in CSS pixels; small images are enlarged up to this
FRAME_MS, LAST_FRAME_MS = 250, 1500  # milliseconds


class Picture(NamedTuple):
    """What an `img` element needs; width and height in CSS pixels."""

    uri: str
    alt: str
    width: int
    height: int


def picture(images: Tensor, columns: int, alt: str) -> Picture:
    """A grid of images, uint8 `[N,C,H,W]`."""
    pixels = grid(_thumbnails(images), columns, zoom=1)
    _, height, width = pixels.shape
    return _picture(encode_png(pixels), alt, height, width, GRID_WIDTH)


def animation(frames: Tensor, alt: str) -> Picture:
    """An animated PNG that repeats; frames uint8 `[L,N,C,H,W]` of N images side by side."""
    grids = [grid(_thumbnails(images), len(images), zoom=1) for images in frames]
    first, *others = (Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in grids)  # [3,H,W] -> [H,W,3]
    times = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=True, append_images=others, duration=times, loop=0)
    return _picture(buffer.getvalue(), alt, first.height, first.width, ANIMATION_WIDTH)


def _thumbnails(images: Tensor) -> Tensor:
    """The images, scaled down if a side is longer than THUMBNAIL."""
    height, width = images.shape[2:]
    if (longest := max(height, width)) <= THUMBNAIL:
        return images
    size = [max(1, side * THUMBNAIL // longest) for side in (height, width)]
    return to_uint8(F.interpolate(to_float(images), size, mode="area"))


def _picture(png: bytes, alt: str, height: int, width: int, most: int) -> Picture:
    zoom = max(1, most // width)
    uri = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return Picture(uri, alt, zoom * width, zoom * height)
