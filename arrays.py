"""Arrays of whole numbers that a caller passes, of any kind, as the tensors that the program computes with.

Lists, NumPy arrays (read-only, strided, of any byte order and integer type) and tensors (on any device, with or without
a gradient) are the same if their values are. What does not fit is refused in one sentence that names the argument.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import ImageData, with_origin
from errors import UserError
from image_files import reason

PIXELS = (0, 255)
SMALLEST_SIDE = 8
MOST_CLASSES = 10_000  # where their names are not given
SPLITS = ("train", "test", "held_out")

Shape = tuple[int | str, ...]
"""Lengths of the axes of an array; a letter stands for any length."""


def as_integers(values: Any, name: str, shape: Shape, bounds: tuple[int, int], dtype: type = np.int64) -> Tensor:
    """Whole numbers of this shape, within these bounds, as a contiguous tensor on the CPU.

    Raises UserError, which calls the argument `name`, for anything else, or if there are none.
    """
    low, high = bounds
    wanted = f"{name} must be whole numbers from {low} to {high} in the shape [{','.join(map(str, shape))}]"
    return _as_numbers(values, name, shape, bounds, dtype, "iu", wanted)


def as_mask(values: Any, name: str, shape: Shape) -> Tensor:
    """The same for truth values, which may be written as 0 and 1: a bool tensor."""
    wanted = f"{name} must be True or False in the shape [{','.join(map(str, shape))}]"
    return _as_numbers(values, name, shape, (0, 1), bool, "iub", wanted)


def as_images(values: Any, name: str, shape: Shape = ("N", "C", "H", "W")) -> Tensor:
    """The same for images: a uint8 tensor `[N,C,H,W]`, with C 1 or 3 and sides of 8 pixels or more."""
    images = as_integers(values, name, shape, PIXELS, np.uint8)
    _, channels, height, width = images.shape
    if channels not in (1, 3):
        advice = "move the channels with .transpose(0, 3, 1, 2)" if width in (1, 3) else "keep 1 or 3"
        raise UserError(f"{name} of the shape [N,C,H,W] has {channels} channels, but must have 1 or 3: {advice}")
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(f"{name} has {width}x{height} pixels, but must have {SMALLEST_SIDE}x{SMALLEST_SIDE} or more")
    return images


def _as_numbers(
    values: Any, name: str, shape: Shape, bounds: tuple[int, int], dtype: type, kinds: str, wanted: str
) -> Tensor:
    if isinstance(values, Dataset):  # NumPy would read it item by item
        raise UserError(f"{wanted}, not {type(values).__name__}: put its images, or its labels, into an array")
    try:
        array = np.asarray(_plain(values))
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, a tensor without data
        raise UserError(f"{wanted}, and cannot be read as an array: {reason(error)}") from error
    if array.dtype.kind not in "biufc":
        raise UserError(f"{wanted}, not {type(values).__name__}")
    if len(array.shape) and not array.size:
        raise UserError(f"{name} is empty: {wanted}")
    axes = zip(array.shape, shape, strict=False)
    fits = array.ndim == len(shape) and all(isinstance(want, str) or have == want for have, want in axes)
    if not fits or array.dtype.kind not in kinds:
        raise UserError(f"{wanted}, not {array.dtype} {list(array.shape)}")
    least, most = array.min(), array.max()
    if least < bounds[0] or most > bounds[1]:
        raise UserError(f"{wanted}, not from {least} to {most}")
    return torch.from_numpy(np.require(array, dtype, ("C", "W")))  # torch warns of arrays that must not be written


def _plain(values: Any) -> Any:
    """What NumPy can read: tensors, also in lists, as arrays."""
    if isinstance(values, Tensor):
        return values.numpy(force=True)
    if isinstance(values, list | tuple) and any(isinstance(each, Tensor | list | tuple) for each in values):
        return [_plain(each) for each in values]
    return values


# ---- data sets ----


def image_data(
    train: Any,
    test: Any,
    *,
    held_out: Any = None,
    train_labels: Any = None,
    test_labels: Any = None,
    held_out_labels: Any = None,
    class_names: Sequence[str] | None = None,
    name: str = "ImageFolder",
) -> ImageData:
    """A data set of arrays: images `[N,C,H,W]` of 0 (black) to 255, C 1 or 3, all of one size, and their labels `[N]`.

    `held_out` are training images that no training sees. Labels are numbers of classes, from 0 in the order of
    `class_names`, by default "0", "1", ...; where one split has them, all have. Raises UserError, which names the
    argument, if something does not fit.
    """
    labels = train_labels, test_labels, held_out_labels
    return _checked(ImageData(name, train, test, held_out, *labels, class_names), "")  # type: ignore[arg-type]


def checked(data: ImageData) -> ImageData:
    """The same data set, with tensors whatever arrays it has been made of, and checked as by `image_data`.

    Training images may be missing.
    """
    if not isinstance(data, ImageData):
        raise UserError(f"data must be what load_dataset or image_data returns, not {type(data).__name__}")
    return with_origin(_checked(data, "data."), data.loaded)


def _checked(data: ImageData, of: str) -> ImageData:
    if not isinstance(data.name, str):
        raise UserError(f"{of}name must be a text, not {type(data.name).__name__}")
    given = {each.name: getattr(data, each.name) for each in fields(data) if each.init}
    first = "test" if of and _is_empty(data.train) else "train"
    like = as_images(given[first], of + first)
    shape = ("N", *like.shape[1:])
    for split in SPLITS:
        missing = split not in (first, "test") and _is_empty(given[split])
        given[split] = like[:0] if missing else as_images(given[split], of + split, shape)
    return ImageData(**given | _labels(given, of))


def _labels(given: dict[str, Any], of: str) -> dict[str, Any]:
    """The labels of all splits, and the names of the classes; all None without labels."""
    names = _class_names(given["class_names"], f"{of}class_names")
    keys = {f"{split}_labels": len(given[split]) for split in SPLITS}
    if all(given[key] is None for key in keys):
        if names is not None:
            raise UserError(f"{of}class_names is given, but no labels: give {of}train_labels and {of}test_labels, too")
        return {}
    bounds = 0, (len(names) if names else MOST_CLASSES) - 1
    if missing := [of + key for key, count in keys.items() if count and given[key] is None]:
        raise UserError(f"{' and '.join(missing)} must be given, too: where one split has labels, all have")
    labels = {
        key: as_integers(given[key], of + key, (count,), bounds)
        if count or not _is_empty(given[key])
        else torch.empty(0, dtype=torch.int64)
        for key, count in keys.items()
    }
    if names is None:
        everyone = torch.cat(list(labels.values()))
        if everyone.min():
            advice = f"number the classes from 0, or name all of them in {of}class_names"
            raise UserError(f"{of}train_labels begins with class {everyone.min()}: {advice}")
        names = tuple(map(str, range(int(everyone.max()) + 1)))
    return {**labels, "class_names": names}


def _class_names(names: Any, name: str) -> tuple[str, ...] | None:
    """Names of classes as a tuple. Raises UserError if they are not a sequence of different texts."""
    if names is None:
        return None
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if not isinstance(names, list | tuple) or not all(isinstance(each, str) for each in names) or not names:
        raise UserError(f"{name} must be a list of texts, one for each class, not {names!r}")
    if len(set(names)) < len(names):
        raise UserError(f"{name} has the same name twice: each class needs its own")
    return tuple(names)


def _is_empty(values: Any) -> bool:
    return values is None or (hasattr(values, "__len__") and getattr(values, "shape", (1,)) != () and len(values) == 0)
