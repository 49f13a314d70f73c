"""The table of data sets: whole sets as uint8 tensors in memory, whatever they came from.

`load_dataset(name, data_path)` is the one entry point. What a user can fix (files missing,
damaged or unreadable, options that do not fit) raises `UserError`.
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, EMNIST, KMNIST, MNIST, FashionMNIST

from errors import UserError
from files import expand
from image_files import reason
from parts import DATASETS, find_part

DOWNSAMPLING = 4  # side of an image over side of its grid of codes


class Split(NamedTuple):
    """Images uint8 [N,C,H,W] and their classes int64 [N] from 0, or None where a set has none."""

    images: Tensor
    labels: Tensor | None = None

    def take(self, which: slice | Tensor) -> "Split":
        """Part of the split."""
        return Split(self.images[which].contiguous(), None if self.labels is None else self.labels[which])


class Source(NamedTuple):
    """Both splits of a data set, and the names of its classes in the order of the labels, or None without labels."""

    train: Split
    test: Split
    class_names: tuple[str, ...] | None = None


def digest(*parts: Tensor | Mapping[str, Tensor] | str) -> str:
    """Sixteen hexadecimal digits that stand for the contents of tensors, state dicts and strings, in this order."""
    sha = hashlib.sha256()
    for part in parts:
        for name, value in part.items() if isinstance(part, Mapping) else [("", part)]:
            if isinstance(value, Tensor):
                sha.update(f"{name} {value.dtype} {list(value.shape)};".encode())
                sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            else:
                sha.update(f"{value};".encode())
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class ImageData:
    """A data set: `train`, `test` and `held_out` (training images kept from training), uint8 [N,C,H,W], 0 black to 255.

    Labels are int64 [N], classes from 0 in the order of `class_names`; all of them are None where a set has no classes.

    Made by `load_dataset`, or from arrays by `arrays.image_data`, which checks them. `loaded` are the options that
    `load_dataset` was given, empty for any other images: `dataclasses.replace` does not keep them.
    """

    name: str
    train: Tensor
    test: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    loaded: Mapping[str, Any] = field(init=False, default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The options of the command line that are true of these images, by name.

        Where they were loaded from is not among them if they were not.
        """
        counts = {"held_out": len(self.held_out), "train_images": len(self.train) + len(self.held_out)}
        channels, height, width = self.shape
        own = {"channels": channels, "image_size": height} if self.name == "ImageFolder" and height == width else {}
        return {"dataset_name": self.name, **(self.loaded or counts | own)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def variance(self) -> float:
        """Population variance over all pixels of the training images on the scale [0,1].

        A pixel has 256 values, so their histogram gives it exactly, without a float copy of the set.
        """
        share = torch.bincount(self.train.flatten(), minlength=256).double() / self.train.numel()
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = (share * level).sum()
        return (share * (level - mean).square()).sum().item()

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """For each split the number of its images, `count`, and a digest of images and labels, `sha256` (16 digits)."""
        splits = {
            "train": (self.train, self.train_labels),
            "held_out": (self.held_out, self.held_out_labels),
            "test": (self.test, self.test_labels),
        }
        return {
            name: {"count": len(images), "sha256": digest(images) if labels is None else digest(images, labels)}
            for name, (images, labels) in splits.items()
        }


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
    size and colours of their own. Raises UserError for anything the user can fix.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    wanted = {"image_size": image_size, "channels": channels}
    for key, value in {"train_images": train_images, "held_out": held_out, **wanted}.items():
        if isinstance(value, bool) or not isinstance(value, Integral if key == "held_out" else Integral | None):
            raise UserError(f"{key} must be a whole number, not {value!r}")
    if not isinstance(data_path, str | Path):
        raise UserError(f"data_path must be a path, not {data_path!r}")
    options = {key: value for key, value in wanted.items() if value is not None}
    if options and name != "ImageFolder":
        raise UserError(f"{' and '.join(options)} can be chosen for ImageFolder only: leave out for {name}")
    with torch.device("cpu"):  # whatever a program has set as its default
        data = _split(name, find_part(DATASETS, name)(expand(data_path), train_images, **options), held_out)
    given = {"data_path": expand(data_path).absolute(), "train_images": train_images, "held_out": held_out, **wanted}
    return with_origin(data, given)


def with_origin(data: ImageData, loaded: Mapping[str, Any]) -> ImageData:
    """The same data set, loaded with these options."""
    object.__setattr__(same := replace(data), "loaded", loaded)
    return same


def _split(name: str, source: Source, held_out: int) -> ImageData:
    """The data set, with images held out of the training split."""
    train, test, class_names = source
    if not 0 <= held_out < len(train.images):
        raise UserError(
            f"held_out is {held_out}, but must be from 0 to {len(train.images) - 1}, one less than the split"
        )
    apart = torch.zeros(len(train.images), dtype=torch.bool)
    apart[torch.arange(held_out) * len(apart) // max(held_out, 1)] = True
    kept, held, test = train.take(~apart), train.take(apart), test.take(slice(None))
    labels = kept.labels, test.labels, held.labels
    return ImageData(name, kept.images, test.images, held.images, *labels, class_names)


def needs_download(name: str, data_path: str | Path) -> bool:
    """Whether `load_dataset` would have to download the data set of this name, since it is not in `data_path`."""
    load = find_part(DATASETS, name)
    if not isinstance(load, partial):
        return False
    _, folder, files, *_ = load.args  # of _load_torchvision
    return bool(_missing(expand(data_path) / folder, files))


def up_to(count: int | None, total: int) -> slice:
    """The first `count` of `total` training images, all of them for None."""
    if count is not None and not 1 <= count <= total:
        raise UserError(f"train_images is {count}, but must be from 1 to {total}, the size of the split")
    return slice(count)


# ---- sets that torchvision reads and downloads ----


def _load_torchvision(
    source: Callable,
    folder: str,
    files: Sequence[str],
    url: str,
    to_nchw: Callable[[Tensor], Tensor],
    root: Path,
    train_images: int | None,
) -> Source:
    """Both splits of `source`, whose `files` lie in `root/folder` or are fetched from `url`.

    torchvision looks for the files first: `download=True` stays off the network where they are present.
    """
    try:
        with redirect_stdout(io.StringIO()):  # some versions narrate each file; the progress bar stays
            splits = [source(root, train=train, download=True) for train in (True, False)]
        images = [to_nchw(torch.as_tensor(split.data)) for split in splits]
        targets = [torch.as_tensor(split.targets) for split in splits]
        for some, theirs in zip(images, targets, strict=True):
            if len(some) != len(theirs):
                raise ValueError(f"{len(some)} images have {len(theirs)} labels")
        present, labels = torch.cat(targets).unique(return_inverse=True)
        class_names = tuple(splits[0].classes[label] for label in present)
    except Exception as error:  # a bad file or connection raises anything from AssertionError to zlib.error
        missing = _missing(root / folder, files)
        if missing:
            cause = f"{root / folder} lacks {', '.join(missing)} and the download failed ({reason(error)})"
            raise UserError(f"{cause}: put the files there, they come from {url}") from error
        cause = f"a file in {root / folder} is damaged or unreadable ({reason(error)})"
        raise UserError(f"{cause}: delete {', '.join(files)} there to download them again") from error
    train, test = map(Split, images, labels.split([len(some) for some in images]))
    return Source(train.take(up_to(train_images, len(train.images))), test, class_names)


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [file for file in files if not os.path.isfile(folder / file)]


def _mnist_like(source: type[MNIST]) -> Callable:
    """Loader of a set laid out as MNIST is: four IDX files, images [N,H,W]."""
    files = [name.removesuffix(".gz") for name, _ in source.resources]
    folder = f"{source.__name__}/raw"
    return partial(_load_torchvision, source, folder, files, source.mirrors[0], lambda x: x[:, None])


load_mnist, load_fmnist, load_kmnist = map(_mnist_like, (MNIST, FashionMNIST, KMNIST))
load_letters = partial(
    _load_torchvision,
    partial(EMNIST, split="letters"),
    "EMNIST/raw",
    [f"emnist-letters-{s}-{x}-ubyte" for s in ("train", "test") for x in ("images-idx3", "labels-idx1")],
    EMNIST.url,
    lambda x: x.transpose(1, 2)[:, None],  # the file holds columns where MNIST's holds rows
)
load_cifar10 = partial(
    _load_torchvision,
    CIFAR10,
    CIFAR10.base_folder,
    [file for file, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]],
    CIFAR10.url,
    lambda x: x.permute(0, 3, 1, 2),  # [N,H,W,C] -> [N,C,H,W]
)


# ---- the set that comes with scikit-learn ----


def load_digits(root: Path, train_images: int | None) -> Source:
    """1,797 handwritten digits, 8x8 with levels 0 to 16, enlarged to [1,28,28].

    Every fifth image, from the first, is test: 1,437 and 360. `root` is not used: the files are bundled.
    """
    import sklearn.datasets  # here because importing it takes a second

    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bicubic", antialias=True)
    images = images.round(decimals=6)  # ties, which are off by the rounding of the processor, are ties again
    images = images.round().clamp(0, 255).byte()  # bicubic overshoots at edges
    both, is_test = Split(images, torch.from_numpy(digits.target)), torch.arange(len(images)) % 5 == 0
    train = both.take(~is_test)
    class_names = tuple(map(str, digits.target_names))
    return Source(train.take(up_to(train_images, len(train.images))), both.take(is_test), class_names)
