"""Images for viewing: grids, originals over reconstructions, a denoising trajectory."""

import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from errors import UserError
from pipeline.checkpoints import check_place, write_file
from pixels import to_uint8

GREY = 128
ZOOM = 3  # screen pixels per image pixel
FONT_SIZE = 20


def grid(images: Tensor, columns: int, zoom: int = ZOOM) -> Tensor:
    """Images uint8 `[N,C,H,W]` side by side, row by row: uint8 `[3,H',W']`, enlarged for the screen."""
    enlarged = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return make_grid(enlarged, columns, padding=zoom, pad_value=GREY)


def ungrid(image: Tensor, height: int, width: int) -> Tensor:
    """The images of these sizes that `grid` has put together at its own zoom: uint8 `[rows, columns, 3, H, W]`."""
    small = image[:, ZOOM::ZOOM, ZOOM::ZOOM]  # each image with a margin of a pixel below and on the right
    tiles = small.unflatten(2, (-1, width + 1)).unflatten(1, (-1, height + 1))  # -> [3,rows,H+1,columns,W+1]
    return tiles[:, :, :height, :, :width].permute(1, 3, 0, 2, 4).contiguous()


def class_grid(images: Tensor, names: Sequence[str], most: int) -> Tensor:
    """A row of images for each of L classes, behind its name: uint8 `[3,H',W']`.

    Of `images`, uint8 `[N,C,H,W]`, number i is of class i modulo L. A row has at most `most`, all have the same number.
    """
    columns = min(len(images) // len(names), most)
    by_class = images[: columns * len(names)].unflatten(0, (columns, -1)).transpose(0, 1).flatten(0, 1)
    return named_rows(grid(by_class, columns), names)


def named_rows(image: Tensor, names: Sequence[str]) -> Tensor:
    """A grid of images, uint8 `[3,H,W]`, with a name before each of its rows: uint8 `[3,H,W']`."""
    rows = Image.fromarray(image.permute(1, 2, 0).numpy())  # [3,H,W] -> [H,W,3]
    font = ImageFont.load_default(FONT_SIZE)
    margin = math.ceil(max(map(font.getlength, names))) + 2 * ZOOM
    page = Image.new("RGB", (margin + rows.width, rows.height), (GREY, GREY, GREY))
    page.paste(rows, (margin, 0))
    for row, name in enumerate(names):
        middle = (row + 0.5) * rows.height / len(names)
        ImageDraw.Draw(page).text((margin - ZOOM, middle), name, "black", font, anchor="rm")
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def encode_png(image: Tensor, about: Mapping[str, str] | None = None) -> bytes:
    """The PNG file of an image, uint8 `[C,H,W]` with C = 1 or 3; `about` are texts that are kept in it by name."""
    pixels = image.permute(1, 2, 0).numpy()  # [C,H,W] -> [H,W,C]
    buffer, texts = io.BytesIO(), PngInfo()
    for name, text in (about or {}).items():
        texts.add_itxt(name, text)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


def save_png(path: Path, image: Tensor, about: Mapping[str, str] | None = None) -> None:
    """Write an image, see `encode_png`."""
    write_file(path, encode_png(image, about))


def check_figure_place(path: Path | None) -> None:
    """Raise UserError now, not after hours of computing, if `save_figure` could not write there; None is no place."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase  # here because importing it takes a second

    if _format(path) not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise UserError(f"{path} cannot be written: a figure's name ends in one of {', '.join(known)}")
    check_place(path)


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure, in the format that the name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=_format(path), dpi=110)
    write_file(path, buffer.getvalue())


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"


def code_colours(codebook_size: int) -> Tensor:
    """A colour for each code and black for the mask token, uint8 `[K+1,3]`; neighbours in number look different."""
    turn = 0.618033988749895  # of the colour wheel from each code to the next: the inverse of the golden ratio
    colours = [colorsys.hsv_to_rgb(k * turn % 1, 0.55 + 0.3 * (k % 2), 0.95) for k in range(codebook_size)]
    return to_uint8(torch.tensor([*colours, (0.0, 0.0, 0.0)]))


def trajectory_images(tokens: Tensor, image: Tensor, codebook_size: int) -> Tensor:
    """Two rows over L moments, uint8 `[2,L,3,H,W]`: tokens (mask black), and the image they determine.

    Args:
        tokens: `[L,h,w]`, from all masked to finished; the mask token is `codebook_size`.
        image: uint8 `[C,H,W]`, the finished image; the cells of masked tokens are shown grey.
        codebook_size: K.
    """
    cell = image.shape[1] // tokens.shape[1]
    pixels = tokens.repeat_interleave(cell, 1).repeat_interleave(cell, 2)  # [L,h,w] -> [L,H,W]
    colours = code_colours(codebook_size)[pixels].permute(0, 3, 1, 2)  # [L,H,W,3] -> [L,3,H,W]
    masked = (pixels == codebook_size)[:, None]
    revealed = torch.where(masked, GREY, image.expand(len(tokens), 3, *image.shape[1:]))
    return torch.stack((colours, revealed.byte()))
