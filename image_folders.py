"""A user's own images as a data set: a folder of image files or of arrays, its splits and its classes."""

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from datasets import DOWNSAMPLING, Source, Split, up_to
from errors import UserError, note
from image_files import (
    ARRAY_ENDINGS,
    Images,
    alternate,
    find_images,
    folders_of,
    identity,
    list_folder,
    read_images,
    stored_labels,
    take,
)

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
    train = train.take(range(len(train.images))[up_to(train_images, len(train.images))])  # before any is read
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
