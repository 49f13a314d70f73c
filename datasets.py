"""The table of data sets: whole sets as uint8 tensors in memory, whatever they came from.

`load_dataset(name, data_path)` is the one entry point. What a user can fix (files missing,
damaged or unreadable, options that do not fit) raises `UserError`.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, EMNIST, KMNIST, MNIST, FashionMNIST

from errors import UserError, note
from files import expand
from image_files import (
    ARRAY_ENDINGS,
    Images,
    alternate,
    find_images,
    folders_of,
    identity,
    list_folder,
    read_images,
    reason,
    stored_labels,
    take,
)
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
    if options and find_part(DATASETS, name) is not load_folder:
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


def _up_to(count: int | None, total: int) -> slice:
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
    return Source(train.take(_up_to(train_images, len(train.images))), test, class_names)


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
    return Source(train.take(_up_to(train_images, len(train.images))), both.take(is_test), class_names)


# ---- a user's own images ----


SPLITS = {"train": "train|training|trn", "test": "test|testing|tst", "val": "val|valid|validation|dev|eval|holdout"}
"""Usual names of splits, in any case, and with an ending such as `_set` or a year; the key itself goes first."""


class Found(NamedTuple):
    """Images before they are read, what each lies in, and the names of the classes that this may stand for, in order.

    An image lies in folders below the root of its split, or in a class of its array file.
    """

    images: Images
    folders: list[tuple[str, ...]]
    order: tuple[str, ...]

    def take(self, which: Sequence[int]) -> "Found":
        """Part of the images."""
        return Found(take(self.images, which), [self.folders[i] for i in which], self.order)


def load_folder(root: Path, train_images: int | None, image_size: int = 32, channels: int | None = None) -> Source:
    """The images that `find_images` finds at `root`, as squares of `image_size` pixels.

    The splits are those of `_splits`; without them, every tenth image in sorted order, from the first, is test. Images
    of different folders or labels alternate, so that the first `train_images` come evenly from all. Labels are as
    `_class_names` says. `channels` None means 1 if every training image is grey, else 3.
    """
    if image_size < 1 or image_size % DOWNSAMPLING:
        raise UserError(f"image_size is {image_size}, but must be a positive multiple of {DOWNSAMPLING}")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey) or 3 (colour)")
    if splits := _splits(root):
        train, test = map(_find, splits)
        _check_apart(train, test, splits)
        class_names = _class_names(train, test)
    else:
        whole = _find_undivided(root)
        train = whole.take([i for i in range(len(whole.images)) if i % 10])
        test = whole.take(range(0, len(whole.images), 10))
        class_names = _class_names(whole, whole)
    train, test = (found.take(alternate(found.folders)) for found in (train, test))
    train = train.take(range(len(train.images))[_up_to(train_images, len(train.images))])  # before any is read
    to_square = partial(ImageOps.fit, size=(image_size, image_size))  # shorter side resized (bicubic), centre kept

    def read(found: Found, channels: int | None) -> Split:
        pixels = torch.from_numpy(read_images(found.images, to_square, channels)).permute(0, 3, 1, 2)  # -> [N,C,H,W]
        return Split(pixels, _labels(found, class_names))

    train_split = read(train, channels)
    return Source(train_split, read(test, train_split.images.shape[1]), class_names)


def _find(root: Path, at_least: int = 1) -> Found:
    images = find_images(root, at_least)
    if labels := stored_labels(root, len(images)):
        return Found(images, [(name,) for name in labels[0]], labels[1])
    folders = folders_of(images, root)
    return Found(images, folders, tuple(sorted({folder[0] for folder in folders if folder})))


def _splits(root: Path) -> tuple[Path, Path] | None:
    """Where the training and the test images are, if `root` holds folders or else array files for both; see SPLITS.

    Validation images are the test images if there are no others. A note says what is not plainly train or test. Raises
    UserError if several could be the same split.
    """
    entries = list_folder(root) if os.path.isdir(root) else []
    folders = [entry.name for entry in entries if os.path.isdir(entry)]
    arrays = [entry.name for entry in entries if Path(entry).suffix.lower() in ARRAY_ENDINGS]
    for names in (folders, arrays):
        kinds = {kind: [name for name in names if _kind_of(name) == kind] for kind in SPLITS}
        held_apart = kinds["test"] or kinds["val"]
        if kinds["train"] and held_apart:
            train, test = _chosen(root, kinds["train"]), _chosen(root, held_apart)
            unread = [name for some in kinds.values() for name in some if name not in (train, test)]
            if unread or (_stem(train), _stem(test)) != ("train", "test"):
                left_out = f"; not read: {', '.join(unread)}" if unread else ""
                note(f"of {root}, {train} is the training split and {test} the test split{left_out}")
            return root / train, root / test
    return None


def _stem(name: str) -> str:
    """A name without the ending of an array file."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in ARRAY_ENDINGS else name


def _kind_of(name: str) -> str | None:
    """The split that the name of a folder or array file is usual for, a key of SPLITS; None for other names."""
    letters = re.sub(r"[\s_-]", "", _stem(name).casefold())
    endings = r"(set|data|images|split)?(\d{4})?"
    return next((kind for kind, usual in SPLITS.items() if re.fullmatch(f"({usual}){endings}", letters)), None)


def _chosen(root: Path, names: Sequence[str]) -> str:
    """The only one of these names, or the only one that is a key of SPLITS. Raises UserError if there is none."""
    plain = [name for name in names if _stem(name) in SPLITS]
    if 1 not in (len(names), len(plain)):
        raise UserError(f"{root} has {' and '.join(names)}, which could be the same split: rename all but one")
    return (plain or names)[0]


def _find_undivided(root: Path) -> Found:
    """The images at `root`, which has no splits of its own. Raises UserError if folders in it look as if it had."""
    found = _find(root, at_least=2)
    if isinstance(found.images, np.ndarray):
        return found
    below: dict[tuple[str, ...], set[str]] = {}
    for folder in set(found.folders):
        for depth in range(len(folder)):
            below.setdefault(folder[:depth], set()).add(folder[depth])
    for parent, names in sorted(below.items()):
        splits = sorted(filter(_kind_of, names))
        if len(splits) > 1:
            where, way = root.joinpath(*parent), "make it the data path" if parent else "name them train and test"
            raise UserError(f"{where} has {' and '.join(splits)}: if they are splits, {way}; else rename them")
        if splits and not parent:
            if all(folder[:1] == (splits[0],) for folder in found.folders):
                note(f"{root} has no split but {splits[0]}: every tenth of its images is a test image")
                return _find(root / splits[0], at_least=2)
            note(f"{splits[0]} in {root} is read like the images beside it, since there is no other split")
    return found


def _check_apart(train: Found, test: Found, roots: Sequence[Path]) -> None:
    """Raise UserError if a test file is a training file, too."""
    ours, theirs = (
        [root] if isinstance(found.images, np.ndarray) else found.images
        for found, root in zip((train, test), roots, strict=True)
    )
    trained_on = {identity(path): path for path in ours}
    for path in theirs:
        if twin := trained_on.get(identity(path)):
            raise UserError(f"{path} is the same file as {twin}: remove one, since no test image may be trained on")


def _class_names(train: Found, test: Found) -> tuple[str, ...] | None:
    """Names of the classes in order, if images have labels or lie as in torchvision's ImageFolder; else None.

    Folders are classes if every image lies exactly one folder below its split's root, the training images lie in at
    least two folders, and no test image lies in a folder without training images. So are labels, but of these UserError
    says which the training images lack.
    """
    present, tested = set(train.folders), set(test.folders)
    if isinstance(train.images, np.ndarray) and (lacking := tested - present):
        names = ", ".join(sorted(name for folder in lacking for name in folder)) or "none"
        raise UserError(f"some test images have labels that no training image has ({names}): correct one of the files")
    if len(present) < 2 or not tested <= present or any(len(folder) != 1 for folder in present):
        return None
    return tuple(name for name in train.order if (name,) in present)


def _labels(found: Found, class_names: tuple[str, ...] | None) -> Tensor | None:
    """Int64 [N], the place of each image's folder among the classes; None without classes."""
    if class_names is None:
        return None
    number: dict[tuple[str, ...], int] = {(name,): label for label, name in enumerate(class_names)}
    return torch.tensor([number[folder] for folder in found.folders], dtype=torch.int64)
