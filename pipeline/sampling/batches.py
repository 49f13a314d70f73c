"""Running trained networks over many images: encode, draw codes, decode; and the files of `samples/`."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.absorbing import AbsorbingDiffusion, SamplingNoise
from models import Denoiser, VQAutoencoder
from pipeline.checkpoints import write_whole
from pipeline.runtime import processes
from pipeline.runtime.device import Machine
from pipeline.sampling.grids import class_grid, encode_png, grid, save_png, to_float, to_uint8

GRID_IMAGES = 64
CLASS_IMAGES = 10  # of each class that is asked for


def in_batches(tensor: Tensor, batch_size: int, title: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(part)` for each part of a tensor, put together on the CPU; with a progress bar if there are many.

    Several processes share the parts, and each is given the whole result.
    """
    mine = tensor[processes.share(len(tensor))]
    hidden = None if len(mine) > 1000 and processes.is_rank_0() else True  # None: where stderr is no terminal
    done = []
    with tqdm(total=len(mine), desc=title, unit=" images", leave=False, disable=hidden) as bar:
        for part in mine.split(batch_size) if len(mine) else ():
            done.append(compute(part).cpu())
            bar.update(len(part))
    return processes.gather(done)


@torch.no_grad()
def encode_images(model: VQAutoencoder, images: Tensor, machine: Machine, batch_size: int = 64) -> Tensor:
    """Codes of `images`, uint8 `[N,C,H,W]`, as the smallest integer type that holds them: `[N,h,w]` on the CPU."""
    model.eval()

    def encode(part: Tensor) -> Tensor:
        return model.encode(to_float(part.to(machine.device))).to(torch.int16)

    with machine.autocast():
        return in_batches(images, batch_size, "encoding", encode)


@torch.no_grad()
def decode_codes(model: VQAutoencoder, codes: Tensor, machine: Machine, batch_size: int = 64) -> Tensor:
    """Images of `codes [N,h,w]`, uint8 `[N,C,H,W]` on the CPU."""
    model.eval()

    def decode(part: Tensor) -> Tensor:
        return to_uint8(model.decode(part.to(machine.device).long()))

    with machine.autocast():
        return in_batches(codes, batch_size, "decoding", decode)


def draw_codes(
    denoiser: Denoiser,
    diffusion: AbsorbingDiffusion,
    noise: SamplingNoise,
    machine: Machine,
    batch_size: int = 64,
    given: Tensor | None = None,
    condition: Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
    final_temperature: float | None = None,
) -> Tensor:
    """Codes int64 `[N,h,w]` on the CPU, one grid for each of the N samples of `noise`.

    Tokens of `given [N,h,w]` that are not masked are kept. For `condition` and temperatures see
    `AbsorbingDiffusion.sample`, for `guidance`, which is of no effect without a condition, `Denoiser.guided_logits_at`.
    """
    denoiser.eval()
    is_guided = guidance and condition is not None
    logits_at = partial(denoiser.guided_logits_at, guidance) if is_guided else denoiser.logits_at

    def draw(part: Tensor) -> Tensor:
        here = SamplingNoise(*(values[part].to(machine.device) for values in noise))
        kept = None if given is None else given[part].to(machine.device)
        conditions = None if condition is None else condition[part].to(machine.device)
        return diffusion.sample(logits_at, here, temperature, kept, final_temperature, conditions)

    with machine.autocast():
        return in_batches(torch.arange(len(noise.uniforms)), batch_size, "sampling", draw)


@processes.on_rank_0
def write_samples(folder: Path, images: Tensor, settings: dict[str, Any], classes: Sequence[str] = ()) -> None:
    """Write `images`, uint8 `[N,C,H,W]`, as `grid.png` and `images.npz`; the PNG files of earlier ones are removed.

    The archive has the keys "images", uint8 `[N,H,W,C]`, and "settings", the JSON text of what they were drawn with.
    Where they were drawn of `classes` in turn, with these names, each class has a row of the grid.
    """
    buffer = io.BytesIO()
    pixels = images.permute(0, 2, 3, 1).numpy()  # [N,C,H,W] -> [N,H,W,C]
    np.savez_compressed(buffer, images=pixels, settings=np.array(json.dumps(settings, sort_keys=True)))
    write_whole(folder / "images.npz", buffer.getvalue())
    shutil.rmtree(folder / "png", ignore_errors=True)
    shown = class_grid(images, classes, CLASS_IMAGES) if classes else grid(images[:GRID_IMAGES], 8)
    save_png(folder / "grid.png", shown)


def load_samples(folder: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """The images, uint8 `[N,C,H,W]`, and settings that `write_samples` left; None if there are none to be read."""
    path = folder / "images.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as archive:
            images, settings = torch.from_numpy(archive["images"]), dict(**json.loads(str(archive["settings"])))
    except Exception:  # whatever a damaged archive raises: the images are drawn again
        return None
    return images.permute(0, 3, 1, 2).contiguous(), settings  # [N,H,W,C] -> [N,C,H,W]


def read_samples(folder: Path, settings: dict[str, Any], count: int) -> Tensor | None:
    """The first `count` images, uint8 `[N,C,H,W]`, that `write_samples` left; None unless drawn with these settings."""
    found = load_samples(folder)
    if found is None or found[1] != settings or len(found[0]) < count:
        return None
    return found[0][:count]


@processes.on_rank_0
def write_single_files(folder: Path, images: Tensor) -> None:
    """Write each of `images`, uint8 `[N,C,H,W]`, as a PNG file, numbered from 0."""
    for i, image in enumerate(images):
        write_whole(folder / f"{i:05d}.png", encode_png(image))
