"""The files of `samples/`: a grid of images to look at, and all of them to compute with."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.checkpoints import write_file
from pipeline.runtime.processes import on_rank_0
from pipeline.sampling.grids import class_grid, encode_png, grid, save_png

INPAINTED = "inpainted.png"
GRID_IMAGES = 64
CLASS_IMAGES = 10  # of each class that is asked for


@on_rank_0
def write_samples(folder: Path, images: Tensor, settings: dict[str, Any], classes: Sequence[str] = ()) -> None:
    """Write `images`, uint8 `[N,C,H,W]`, as `grid.png` and `images.npz`; the PNG files of earlier ones are removed.

    The archive has the keys "images", uint8 `[N,H,W,C]`, and "settings", the JSON text of what they were drawn with.
    Where they were drawn of `classes` in turn, with these names, each class has a row of the grid.
    """
    buffer = io.BytesIO()
    pixels = images.permute(0, 2, 3, 1).numpy()  # [N,C,H,W] -> [N,H,W,C]
    np.savez_compressed(buffer, images=pixels, settings=np.array(json.dumps(settings, sort_keys=True)))
    write_file(folder / "images.npz", buffer.getvalue())
    shutil.rmtree(folder / "png", ignore_errors=True)
    shown = class_grid(images, classes, CLASS_IMAGES) if classes else grid(images[:GRID_IMAGES], 8)
    save_png(folder / "grid.png", shown)


def load_samples(folder: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """The images, uint8 `[N,C,H,W]`, and settings that `write_samples` left; None if there are none to be read."""
    try:
        with np.load(folder / "images.npz") as archive:
            images, settings = torch.from_numpy(archive["images"]), _settings(archive)
    except Exception:  # whatever a damaged archive raises: the images are drawn again
        return None
    return images.permute(0, 3, 1, 2).contiguous(), settings  # [N,H,W,C] -> [N,C,H,W]


def drawn_with(folder: Path) -> dict[str, Any]:
    """The settings alone, without the time that it takes to read the images; empty if there are none to be read."""
    try:
        with np.load(folder / "images.npz") as archive:
            return _settings(archive)
    except Exception:  # as above
        return {}


def _settings(archive: np.lib.npyio.NpzFile) -> dict[str, Any]:
    return dict(**json.loads(str(archive["settings"])))


def read_samples(folder: Path, settings: dict[str, Any], count: int) -> Tensor | None:
    """The first `count` images, uint8 `[N,C,H,W]`, that `write_samples` left; None unless drawn with these settings."""
    found = load_samples(folder)
    if found is None or found[1] != settings or len(found[0]) < count:
        return None
    return found[0][:count]


def inpainted_of(folder: Path) -> str | None:
    """The checkpoint that completed the images in `inpainted.png`; None where that names none, or is not there."""
    try:
        with Image.open(folder / INPAINTED) as page:
            return page.info.get("checkpoint")
    except OSError:
        return None


@on_rank_0
def write_single_files(folder: Path, images: Tensor) -> None:
    """Write each of `images`, uint8 `[N,C,H,W]`, as a PNG file, numbered from 0."""
    for i, image in enumerate(images):
        write_file(folder / f"{i:05d}.png", encode_png(image))
