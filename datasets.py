"""The table of data sets: whole sets as uint8 tensors in memory, whatever they came from.

`load_dataset(name, data_path)` is the one door. What the person at the keyboard can mend (files missing,
damaged or unreadable, options that do not fit) raises `UserError`.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, EMNIST, KMNIST, MNIST, FashionMNIST

from errors import UserError

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
DOWNSAMPLING = 4  # side of an image over side of its grid of codes


class Split(NamedTuple):
    """Images uint8 [N,C,H,W] and their classes int64 [N] from 0, or None where a set has none."""

    images: Tensor
    labels: Tensor | None = None

    def take(self, which: slice | Tensor) -> "Split":
        """Part of the split."""
        return Split(self.images[which].contiguous(), None if self.labels is None else self.labels[which])


@dataclass(frozen=True)
class ImageData:
    """A data set: `train`, `test` and `held_out` (training images kept from training), uint8 [N,C,H,W], 0 black to 255.

    Labels are int64 [N], classes from 0, or None where a set has no classes.
    """

    name: str
    train: Tensor
    test: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.shape[1:])

    @property
    def fingerprint(self) -> dict:
        """TEMPORARY."""
        import hashlib

        sides = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {
            k: {"count": len(v), "sha256": hashlib.sha256(v.contiguous().numpy().data).hexdigest()[:16]}
            for k, v in sides.items()
        }

    @property
    def variance(self) -> float:
        """Population variance over all pixels of the training images on the scale [0,1].

        A pixel has 256 values, so their histogram gives it exactly, without a float copy of the set.
        """
        share = torch.bincount(self.train.flatten(), minlength=256).double() / self.train.numel()
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = (share * level).sum()
        return (share * (level - mean).square()).sum().item()


def load_dataset(
    name: str,
    data_path: str | Path,
    *,
    train_images: int | None = None,
    held_out: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load a data set of the table `DATASETS`, found in `data_path` or downloaded to it.

    `train_images` keeps that many images from the start of the training split; `held_out` of them, spread evenly, are
    set apart. `image_size` (side in pixels) and `channels` (1 or 3) are for ImageFolder alone: the other sets have a
    size and colours of their own. Raises UserError for anything the user can mend.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    wanted = {"image_size": image_size, "channels": channels}
    options = {key: value for key, value in wanted.items() if value is not None}
    if options and DATASETS[name] is not _load_folder:
        raise UserError(f"{' and '.join(options)} can be chosen for ImageFolder only: leave out for {name}")
    train, test = DATASETS[name](Path(data_path).expanduser(), train_images, **options)
    if held_out >= len(train.images):
        raise UserError(f"held_out is {held_out}, but must be less than the {len(train.images)} training images")
    apart = torch.zeros(len(train.images), dtype=torch.bool)
    apart[torch.arange(held_out) * len(apart) // max(held_out, 1)] = True
    kept, test = train.take(~apart), test.take(slice(None))
    return ImageData(name, kept.images, test.images, train.images[apart], kept.labels, test.labels)


def _up_to(count: int | None, total: int) -> slice:
    """The first `count` of `total` training images, all of them for None."""
    if count is not None and not 1 <= count <= total:
        raise UserError(f"train_images is {count}, but must be from 1 to {total}, the size of the split")
    return slice(count)


def _reason(error: Exception) -> str:
    """The last line of an error, where torchvision and Pillow say what happened."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


# ---- sets that torchvision reads and downloads ----


def _load_torchvision(
    source: Callable,
    folder: str,
    files: Sequence[str],
    url: str,
    to_nchw: Callable[[Tensor], Tensor],
    root: Path,
    train_images: int | None,
) -> tuple[Split, Split]:
    """Both splits of `source`, whose `files` lie in `root/folder` or are fetched from `url`.

    torchvision looks for the files first: `download=True` stays off the network where they are present.
    """
    try:
        with redirect_stdout(io.StringIO()):  # some versions narrate each file; the progress bar stays
            splits = [source(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a bad file or connection raises anything from AssertionError to zlib.error
        missing = [file for file in files if not os.path.isfile(root / folder / file)]
        if missing:
            cause = f"{root / folder} lacks {', '.join(missing)} and the download failed ({_reason(error)})"
            raise UserError(f"{cause}: put the files there, they come from {url}") from error
        cause = f"a file in {root / folder} is damaged or unreadable ({_reason(error)})"
        raise UserError(f"{cause}: delete {', '.join(files)} there to download them again") from error
    images = [to_nchw(torch.as_tensor(split.data)) for split in splits]
    classes = torch.cat([torch.as_tensor(split.targets) for split in splits]).unique(return_inverse=True)[1]
    labels = classes.split([len(split) for split in images])
    train, test = (Split(*pair) for pair in zip(images, labels, strict=True))
    return train.take(_up_to(train_images, len(train.images))), test


def _mnist_like(source: type[MNIST]) -> Callable:
    """Loader of a set laid out as MNIST is: four IDX files, images [N,H,W]."""
    files = [name.removesuffix(".gz") for name, _ in source.resources]
    folder = f"{source.__name__}/raw"
    return partial(_load_torchvision, source, folder, files, source.mirrors[0], lambda x: x[:, None])


# ---- the set that comes with scikit-learn ----


def _load_digits(root: Path, train_images: int | None) -> tuple[Split, Split]:
    """1,797 handwritten digits, 8x8 with levels 0 to 16, enlarged to [1,28,28].

    Every fifth image, from the first, is test: 1,437 and 360. `root` is not used: the files are bundled.
    """
    from sklearn.datasets import load_digits  # here because importing it takes a second

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bicubic", antialias=True)
    images = images.round().clamp(0, 255).byte()  # bicubic overshoots at edges
    both, is_test = Split(images, torch.from_numpy(digits.target)), torch.arange(len(images)) % 5 == 0
    train = both.take(~is_test)
    return train.take(_up_to(train_images, len(train.images))), both.take(is_test)


# ---- a person's own pictures ----


def _load_folder(
    root: Path, train_images: int | None, image_size: int = 32, channels: int | None = None
) -> tuple[Split, Split]:
    """Every picture under `root`, as squares of `image_size` pixels, in sorted order of their paths.

    If `root` has both folders `train` and `test`, these are the splits; otherwise every tenth picture, from
    the first, is test. `channels` None means 1 if every training picture is grey, else 3. Sorted order goes
    class by class where each class has its folder, so the first `train_images` may be of one class.
    """
    if image_size < 1 or image_size % DOWNSAMPLING:
        raise UserError(f"image_size is {image_size}, but must be a positive multiple of {DOWNSAMPLING}")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey) or 3 (colour)")
    if os.path.isdir(root / "train") and os.path.isdir(root / "test"):
        train, test = _find_pictures(root / "train", at_least=1), _find_pictures(root / "test", at_least=1)
    else:
        pictures = _find_pictures(root, at_least=2)
        train, test = [path for i, path in enumerate(pictures) if i % 10], pictures[::10]
    train = train[_up_to(train_images, len(train))]  # before any is read: the rest may be many
    channels = channels or (1 if all(map(_is_grey, train)) else 3)
    return Split(_read_pictures(train, image_size, channels)), Split(_read_pictures(test, image_size, channels))


def _find_pictures(folder: Path, at_least: int) -> list[Path]:
    """Sorted paths of the files under `folder` with a picture's ending; hidden ones are no one's pictures."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read folder {error.filename} ({error.strerror}): mend data_path") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in PICTURE_ENDINGS]
    if len(found) < at_least:
        endings = " ".join(sorted(PICTURE_ENDINGS))
        raise UserError(f"{folder} holds {len(found)} pictures ({endings}): put {at_least} or more there")
    return sorted(found)


@contextmanager
def _open_picture(path: Path) -> Iterator[Image.Image]:
    """The opened picture; whatever fails while it is in use is blamed on the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # each decoder has its own way to refuse damaged bytes
        raise UserError(f"cannot read the picture {path} ({_reason(error)}): mend or remove it") from error


def _is_grey(path: Path) -> bool:
    with _open_picture(path) as image:
        return image.mode in GREY_MODES


def _read_pictures(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """Pictures as uint8 [N,C,size,size]: shorter side resized (bicubic, antialiased), centre kept."""
    mode = "L" if channels == 1 else "RGB"
    images = torch.empty(len(paths), size, size, channels, dtype=torch.uint8)
    for slot, path in zip(images, paths, strict=True):
        with _open_picture(path) as image:
            square = ImageOps.fit(_flatten_picture(image), (size, size)).convert(mode)
        slot.copy_(torch.from_numpy(np.array(square)).view_as(slot))
    return images.permute(0, 3, 1, 2)  # [N,H,W,C] -> [N,C,H,W]


def _flatten_picture(image: Image.Image) -> Image.Image:
    """The first frame, the right way up, in mode L or RGB, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose black and white are not defined")
    if image.mode.startswith("I"):  # 16 bits, which some versions call "I"; Pillow would clip them at 255
        levels = np.asarray(image) / (65535 / 255)
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in GREY_MODES else "RGB")


DATASETS: dict[str, Callable[..., tuple[Split, Split]]] = {
    "MNIST": _mnist_like(MNIST),
    "FMNIST": _mnist_like(FashionMNIST),
    "KMNIST": _mnist_like(KMNIST),
    "Letters": partial(
        _load_torchvision,
        partial(EMNIST, split="letters"),
        "EMNIST/raw",
        [f"emnist-letters-{s}-{x}-ubyte" for s in ("train", "test") for x in ("images-idx3", "labels-idx1")],
        EMNIST.url,
        lambda x: x.transpose(1, 2)[:, None],  # the file holds columns where MNIST's holds rows
    ),
    "CIFAR10": partial(
        _load_torchvision,
        CIFAR10,
        CIFAR10.base_folder,
        [file for file, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]],
        CIFAR10.url,
        lambda x: x.permute(0, 3, 1, 2),  # [N,H,W,C] -> [N,C,H,W]
    ),
    "Digits": _load_digits,
    "ImageFolder": _load_folder,
}
