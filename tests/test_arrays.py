"""Arrays of any kind that hold the right values are the same; others are refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import write_bars
from torch.utils.data import Dataset, TensorDataset

from arrays import as_images, as_integers, as_mask, checked, image_data
from datasets import load_dataset
from errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 10), np.uint8)
LABELS = [0, 2, 1, 0]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


SAME = {
    "list": lambda a: a.tolist(),
    "tuple of arrays": lambda a: tuple(a),
    "list of lists of tensors": lambda a: [[torch.from_numpy(part) for part in image] for image in a],
    "tensor": torch.from_numpy,
    "channels last": lambda a: torch.from_numpy(a).contiguous(memory_format=torch.channels_last),
    "read-only": read_only,
    "reversed view": lambda a: np.flip(np.flip(a, 3).copy(), 3),
    "every second": lambda a: np.repeat(a, 2, 0)[::2],
    "Fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(">u2"),
    "int32": lambda a: a.astype(np.int32),
    "uint64": lambda a: a.astype(np.uint64),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.filterwarnings("error")
def test_any_array_of_the_right_values_is_taken(kind):
    taken = as_images(SAME[kind](IMAGES), "images")
    assert taken.dtype == torch.uint8 and taken.is_contiguous() and np.array_equal(taken.numpy(), IMAGES)
    labels = as_integers(SAME[kind](IMAGES), "labels", ("N", 3, 8, 10), (0, 255))
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), IMAGES)


def test_tensors_of_any_mode():
    with torch.inference_mode():
        images = torch.from_numpy(IMAGES) + 0
    taken = as_images(images, "images")
    assert not taken.is_inference() and np.array_equal(taken.numpy(), IMAGES)


@pytest.mark.parametrize(
    "written", [np.array, np.ndarray.tolist, torch.from_numpy, lambda a: a.astype(np.uint8), lambda a: a.astype(">i4")]
)
def test_masks(written):
    hidden = np.zeros((8, 10), bool)
    hidden[:, 5:] = True
    mask = as_mask(written(hidden), "hidden", (8, 10))
    assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), hidden)


class Unreadable(Dataset):
    """Takes hours to read item by item."""

    def __len__(self):
        return 60_000

    def __getitem__(self, index):
        raise AssertionError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (IMAGES / 255, "not float64 [4, 3, 8, 10]"),
        (np.where(IMAGES > 9, np.nan, 1), "not float64"),
        (torch.zeros(4, 3, 8, 10).bfloat16(), "cannot be read as an array"),
        (IMAGES > 9, "not bool"),
        (IMAGES.astype(complex), "not complex128"),
        (IMAGES[0], "not uint8 [3, 8, 10]"),
        (IMAGES[0, 0], "not uint8 [8, 10]"),
        (IMAGES.astype(np.int16) - 1, "not from -1 to 254"),
        (IMAGES.astype(np.int16) + 1, "not from 1 to 256"),
        (IMAGES.transpose(0, 2, 3, 1), "has 8 channels, but must have 1 or 3: move the channels"),
        (IMAGES[:, :2], "has 2 channels"),
        (IMAGES[..., :7], "has 7x8 pixels, but must have 8x8 or more"),
        (IMAGES[:0], "pictures is empty"),
        ([], "pictures is empty"),
        ([[1, 2], [3]], "cannot be read as an array"),
        (torch.zeros(4, 3, 8, 10, dtype=torch.uint8, device="meta"), "cannot be read as an array"),
        (None, "not NoneType"),
        ("pictures.npy", "not str"),
        ({"images": IMAGES}, "not dict"),
        (7, "not int64 []"),
        (Unreadable(), "not Unreadable: put its images"),
        (TensorDataset(torch.from_numpy(IMAGES)), "not TensorDataset: put its images"),
    ],
)
def test_other_images_are_refused_in_a_sentence(values, message):
    with pytest.raises(UserError) as error:
        as_images(values, "pictures")
    assert message in str(error.value)
    assert str(error.value).startswith("pictures ") and "\n" not in str(error.value)


@pytest.mark.parametrize("values", [np.full((8, 10), 255), np.zeros((8, 10)), np.zeros((1, 8, 10), bool)])
def test_other_masks_are_refused(values):
    with pytest.raises(UserError, match=r"^hidden must be True or False in the shape \[8,10\], not"):
        as_mask(values, "hidden", (8, 10))


# ---- data sets ----


def test_a_data_set_of_arrays():
    data = image_data(IMAGES.tolist(), torch.from_numpy(IMAGES[:2]), train_labels=LABELS, test_labels=np.array([1, 0]))
    assert np.array_equal(data.train.numpy(), IMAGES) and data.held_out.shape == (0, 3, 8, 10)
    assert data.class_names == ("0", "1", "2") and data.train_labels.tolist() == LABELS
    assert data.held_out_labels.dtype == torch.int64 and len(data.held_out_labels) == 0
    assert data.facts == {"dataset_name": "ImageFolder", "held_out": 0, "train_images": 4}, "no squares, so no size"
    square = image_data(IMAGES[..., :8], IMAGES[..., :8], held_out=IMAGES[:1, ..., :8])
    assert square.class_names is None and square.train_labels is None
    assert square.facts["image_size"] == 8 and square.facts["channels"] == 3
    assert square.facts["held_out"] == 1 and square.facts["train_images"] == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_labels": [1, 2, 3, 1], "test_labels": [1, 2]}, "train_labels begins with class 1: number the classes"),
        ({"train_labels": [1, 2, 3, 1], "test_labels": [1, 2], "class_names": "abc"}, "class_names must be a list"),
        (
            {"train_labels": [1, 2, 3, 1], "test_labels": [1, 2], "class_names": ["a", "b", "c"]},
            "train_labels must be whole numbers from 0 to 2 in the shape [4], not from 1 to 3",
        ),
        ({"train_labels": [0, -1, 0, 0], "test_labels": [0, 0]}, "not from -1 to 0"),
        ({"train_labels": [0.0, 1, 0, 0], "test_labels": [0, 0]}, "train_labels must be whole numbers"),
        ({"train_labels": [0, 1, 0], "test_labels": [0, 0]}, "in the shape [4], not int64 [3]"),
        ({"train_labels": [0, 1, 0, 1, 0], "test_labels": [0, 0]}, "in the shape [4], not int64 [5]"),
        ({"train_labels": [[0], [1], [0], [1]], "test_labels": [0, 0]}, "in the shape [4], not int64 [4, 1]"),
        ({"train_labels": LABELS}, "test_labels must be given, too"),
        ({"test_labels": [0, 0]}, "train_labels must be given, too"),
        ({"class_names": ["a"]}, "class_names is given, but no labels"),
        ({"train_labels": LABELS, "test_labels": [0, 0], "class_names": ["a", "a", "b"]}, "the same name twice"),
        ({"train_labels": LABELS, "test_labels": [0, 0], "class_names": 3}, "class_names must be a list"),
        (
            {"train_labels": LABELS, "test_labels": [0, 0], "class_names": np.array(["a", "b"])},
            "whole numbers from 0 to 1",
        ),
        ({"train": IMAGES[:0]}, "train is empty"),
        ({"train": None}, "train must be whole numbers"),
        ({"test": []}, "test is empty"),
        ({"test": IMAGES[:, :1]}, "test must be whole numbers from 0 to 255 in the shape [N,3,8,10]"),
        ({"held_out": IMAGES[..., :8]}, "held_out must be whole numbers from 0 to 255 in the shape [N,3,8,10]"),
        ({"train": IMAGES / 255.0}, "train must be whole numbers"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(UserError) as error:
        image_data(**{"train": IMAGES, "test": IMAGES[:2], **wrong})
    assert message in str(error.value)
    if "train_labels" in wrong and "class_names" not in wrong:  # whoever makes one by hand is told the same
        by_hand = replace(image_data(IMAGES, IMAGES[:2]), **wrong)
        with pytest.raises(UserError, match=r"data\.(train|test)_labels"):
            checked(by_hand)


def test_what_data_were_loaded_with_is_known_until_they_are_changed(tmp_path):
    write_bars(tmp_path / "own", 20, 12, colour=False, seed=0)
    data = load_dataset("ImageFolder", tmp_path / "own", image_size=12, train_images=10, held_out=2)
    options = {"data_path": tmp_path / "own", "train_images": 10, "held_out": 2, "image_size": 12, "channels": None}
    assert data.facts == checked(data).facts == {"dataset_name": "ImageFolder", **options}
    part = replace(data, train=data.train[:5])
    own = {"train_images": 7, "held_out": 2, "image_size": 12, "channels": 1}
    assert part.facts == checked(part).facts == {"dataset_name": "ImageFolder", **own}


def test_training_images_may_be_missing_where_nothing_is_trained():
    data = image_data(IMAGES, IMAGES)
    assert len(checked(replace(data, train=data.train[:0])).train) == 0
    with pytest.raises(UserError, match=r"^data\.test is empty"):
        checked(replace(data, test=[]))
    with pytest.raises(UserError, match=r"^data must be what load_dataset or image_data returns, not ndarray"):
        checked(IMAGES)


def test_a_default_device_does_not_change_what_is_loaded():
    expected = load_dataset("Digits", "", held_out=5)
    torch.set_default_device("meta")
    try:
        data = load_dataset("Digits", "", held_out=5)
    finally:
        torch.set_default_device(None)
    assert data.fingerprint == expected.fingerprint


@pytest.mark.parametrize("option", ["train_images", "held_out", "image_size", "channels"])
@pytest.mark.parametrize("value", ["5", 2.5, [3], True])
def test_numbers_of_a_data_set_are_whole(option, value):
    with pytest.raises(UserError, match=f"^{option} must be a whole number, not "):
        load_dataset("Digits", "", **{option: value})


def test_places_and_names_of_a_data_set_are_checked():
    for name, place, options, message in (
        ("Digits", None, {}, "data_path must be a path, not None"),
        (["Digits"], "data", {}, "unknown data set"),
        ("Digits", "data", {"held_out": None}, "held_out must be a whole number, not None"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            load_dataset(name, place, **options)
