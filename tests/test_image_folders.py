"""A user's own images as a data set: splits, classes, and what is refused."""

import os

import numpy as np
import pytest
import torch
from helpers import complaint, noise
from PIL import Image

from datasets import load_dataset


def write_images(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def test_every_tenth_image_is_test(tmp_path):
    images = noise(23, 32, 32)
    write_images(tmp_path, images)
    data = load_dataset("ImageFolder", tmp_path)
    is_test = np.arange(23) % 10 == 0
    assert data.shape == (1, 32, 32)
    assert np.array_equal(data.test, images[is_test, None]) and np.array_equal(data.train, images[~is_test, None])


def test_train_and_test_folders_are_the_splits(tmp_path):
    train, test = noise(3, 32, 32, 3), noise(2, 32, 32, 3, seed=1)
    write_images(tmp_path / "train" / "cats", train)
    write_images(tmp_path / "test" / "cats", test)
    data = load_dataset("ImageFolder", tmp_path)
    assert np.array_equal(data.train, train.transpose(0, 3, 1, 2))
    assert np.array_equal(data.test, test.transpose(0, 3, 1, 2))
    assert data.train.is_contiguous() and data.train.dtype == torch.uint8


@pytest.mark.parametrize("folders", [("train", "val"), ("train", "val", "test")])
def test_val_is_the_test_split_where_there_is_no_other(tmp_path, folders):
    for level, folder in enumerate(folders):
        write_images(tmp_path / folder, np.full((2, 32, 32), level, np.uint8))
    data = load_dataset("ImageFolder", tmp_path)
    assert (data.train == 0).all() and (data.test == len(folders) - 1).all()
    assert len(data.train) == len(data.test) == 2


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_is_in_one_split_only(tmp_path, link):
    for folder in ("train", "test"):
        write_images(tmp_path / folder, noise(2, 32, 32))
    link(tmp_path / "train" / "001.png", tmp_path / "test" / "again.png")
    message = complaint("ImageFolder", tmp_path)
    assert str(tmp_path / "train" / "001.png") in message and str(tmp_path / "test" / "again.png") in message


def test_channels_follow_the_training_images_or_the_wish(tmp_path):
    write_images(tmp_path / "train", [noise(32, 32), np.full((32, 32, 3), (255, 0, 0), np.uint8)])
    write_images(tmp_path / "test", [noise(32, 32)])
    assert load_dataset("ImageFolder", tmp_path).shape == (3, 32, 32)
    grey = load_dataset("ImageFolder", tmp_path, channels=1)
    assert grey.shape == (1, 32, 32) and (grey.train[1] == 76).all()  # 0.299 * 255
    assert load_dataset("ImageFolder", tmp_path, train_images=1).shape == (1, 32, 32)
    tripled = load_dataset("ImageFolder", tmp_path, train_images=1, channels=3).train
    assert (tripled == tripled[:, :1]).all()


def test_centre_is_kept_and_downsampling_averages(tmp_path):
    wide = np.zeros((64, 192), np.uint8)
    wide[:, 64:128] = np.indices((64, 64)).sum(0) % 2 * 255  # a chequered centre between black sides
    write_images(tmp_path, [wide, wide.T.copy()])
    data = load_dataset("ImageFolder", tmp_path, image_size=16)
    for image in (data.train[0, 0], data.test[0, 0]):
        assert image.shape == (16, 16)
        assert (image[2:-2, 2:-2].int() - 127).abs().max() <= 6  # without antialiasing 0 or 255


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0], rgba[:16, :, 3] = 200, 255  # red, opaque in the upper half only
    write_images(tmp_path, [rgba, rgba])
    palette = Image.fromarray(np.indices((32, 32))[0].astype(np.uint8) // 16).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=1)
    image, indexed = load_dataset("ImageFolder", tmp_path).train
    assert image[:, 3, 3].tolist() == [200, 0, 0] and image[:, 28, 3].tolist() == [255, 255, 255]
    assert indexed[:, 3, 3].tolist() == [10, 20, 30] and indexed[:, 28, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, ending):
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for i in range(2):
        Image.fromarray(levels).save(tmp_path / f"{i}.{ending}")
    data = load_dataset("ImageFolder", tmp_path)
    assert data.shape == (1, 32, 32)
    assert np.array_equal(data.train[0, 0], np.round(levels / 257))


def test_black_and_white_and_rotated_images(tmp_path):
    pixels = noise(32, 32)
    Image.fromarray(pixels).convert("1", dither=Image.Dither.NONE).save(tmp_path / "0.png")
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise to view
    turned.save(tmp_path / "1.png", exif=exif)
    data = load_dataset("ImageFolder", tmp_path)
    assert np.array_equal(data.test[0, 0], np.where(pixels > 127, 255, 0))
    assert np.array_equal(data.train[0, 0], np.rot90(pixels, -1))


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif"])
def test_truncated_image_is_named(tmp_path, ending):
    for i in range(3):
        Image.fromarray(noise(64, 64)).save(tmp_path / f"{i}.{ending}")
    damaged = tmp_path / f"1.{ending}"
    damaged.write_bytes(damaged.read_bytes()[:-900])
    assert str(damaged) in complaint("ImageFolder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_foreign_file_is_named(tmp_path, content):
    write_images(tmp_path, noise(3, 32, 32))
    (tmp_path / "002.png").write_bytes(content)
    assert str(tmp_path / "002.png") in complaint("ImageFolder", tmp_path)


def test_float_pixels_are_refused(tmp_path):
    write_images(tmp_path, noise(2, 32, 32))
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "depth.tiff")
    assert "depth.tiff" in complaint("ImageFolder", tmp_path)


def test_images_beyond_train_images_are_not_read(tmp_path):
    images = noise(6, 32, 32)
    write_images(tmp_path, images)
    (tmp_path / "005.png").write_bytes(b"damaged")
    data = load_dataset("ImageFolder", tmp_path, train_images=4)
    assert np.array_equal(data.train, images[1:5, None])
    assert "5" in complaint("ImageFolder", tmp_path, train_images=6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(tmp_path, count):
    write_images(tmp_path, noise(count, 32, 32))
    assert f"{tmp_path} holds {count} images" in complaint("ImageFolder", tmp_path)


def test_empty_test_folder(tmp_path):
    write_images(tmp_path / "train", noise(3, 32, 32))
    (tmp_path / "test").mkdir()
    assert str(tmp_path / "test") in complaint("ImageFolder", tmp_path)


def test_folder_missing_or_not_a_folder(tmp_path):
    assert str(tmp_path / "absent") in complaint("ImageFolder", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in complaint("ImageFolder", tmp_path / "file")


@pytest.mark.parametrize("size", [-4, 0, 2, 30])
def test_image_size_must_be_a_multiple_of_four(tmp_path, size):
    assert str(size) in complaint("ImageFolder", tmp_path, image_size=size)


def test_channels_must_be_one_or_three(tmp_path):
    assert "channels is 2" in complaint("ImageFolder", tmp_path, channels=2)


# ---- class folders ----


def write_classes(root, counts):
    """So many images of each class; those of the k-th have the level k."""
    for level, (name, count) in enumerate(sorted(counts.items())):
        write_images(root / name, np.full((count, 8, 8), level, np.uint8))


def levels(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("split", [True, False])
def test_class_folders_give_labels(tmp_path, split):
    counts = {"dog": 12, "Cat": 15, "bird": 11}
    write_classes(tmp_path / "train" if split else tmp_path, counts)
    if split:
        write_classes(tmp_path / "test", {"dog": 2, "Cat": 3, "bird": 2})
    data = load_dataset("ImageFolder", tmp_path, image_size=8, held_out=9)
    assert data.class_names == ("Cat", "bird", "dog")  # sorted as torchvision's ImageFolder sorts them
    for images, labels in (
        (data.train, data.train_labels),
        (data.test, data.test_labels),
        (data.held_out, data.held_out_labels),
    ):
        assert labels.dtype == torch.int64 and levels(images) == labels.tolist()
        assert set(labels.tolist()) == {0, 1, 2}


def test_labels_of_a_test_split_without_some_class_are_those_of_training(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_images(tmp_path / "test" / "c", noise(2, 8, 8))
    data = load_dataset("ImageFolder", tmp_path, image_size=8)
    assert data.class_names == ("a", "b", "c") and data.test_labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    "stray",
    ["loose.png", "a/deeper/image.png", "test/new/image.png", "test/loose.png", "all in one"],
)
def test_folders_that_are_not_classes(tmp_path, stray):
    classes = {"a": 3} if stray == "all in one" else {"a": 3, "b": 3}
    root = tmp_path / "train" if stray.startswith("test") else tmp_path
    write_classes(root, classes)
    if stray.startswith("test"):
        write_classes(tmp_path / "test", classes)
    if stray != "all in one":
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8)).save(tmp_path / stray)
    data = load_dataset("ImageFolder", tmp_path, image_size=8)
    assert data.class_names is data.train_labels is data.test_labels is data.held_out_labels is None


def test_part_of_the_training_images_is_of_all_classes(tmp_path):
    write_classes(tmp_path / "train", {name: 40 for name in "abcdefgh"})
    write_classes(tmp_path / "test", {name: 4 for name in "abcdefgh"})
    data = load_dataset("ImageFolder", tmp_path, image_size=8, train_images=80)
    assert data.train_labels.bincount().tolist() == [10] * 8
    assert data.test_labels[:8].sort().values.tolist() == list(range(8))  # some metrics take the first ones
    held_out = load_dataset("ImageFolder", tmp_path, image_size=8, held_out=40).held_out_labels  # every eighth
    assert len(held_out.unique()) > 4


def test_small_classes_run_out_first(tmp_path):
    write_classes(tmp_path / "train", {"few": 2, "many": 6})
    write_classes(tmp_path / "test", {"few": 1, "many": 1})
    labels = load_dataset("ImageFolder", tmp_path, image_size=8).train_labels.tolist()
    assert sorted(labels[:2]) == sorted(labels[2:4]) == [0, 1] and labels[4:] == [1] * 4


def test_images_keep_their_order_when_the_folder_moves(tmp_path):
    for place in ("here", "there/below"):
        write_classes(tmp_path / place, {name: 5 for name in "abc"})
    here, there = (load_dataset("ImageFolder", tmp_path / place, image_size=8) for place in ("here", "there/below"))
    assert here.fingerprint == there.fingerprint


# ---- folders and files that look like splits ----


@pytest.mark.parametrize(
    ("names", "train", "test", "words"),
    [
        (["train", "test"], "train", "test", ""),
        (["train", "val"], "train", "val", "train is the training split and val the test split"),
        (
            ["train", "val", "test"],
            "train",
            "test",
            "train is the training split and test the test split; not read",
        ),
        (["Train", "Test"], "Train", "Test", "Train is the training split and Test the test split"),
        (["TRAIN", "VALID"], "TRAIN", "VALID", "TRAIN is the training split and VALID the test split"),
        (["training", "validation", "testing"], "training", "testing", "; not read: validation"),
        (["train", "dev"], "train", "dev", "train is the training split and dev the test split"),
        (["train_set", "Test-Images"], "train_set", "Test-Images", "train_set is the training split"),
        (["train2017", "val2017"], "train2017", "val2017", "val2017 the test split"),
        (["train", "training", "test"], "train", "test", "; not read: training"),
        (["train", "val", "valid"], "train", "val", "; not read: valid"),
        (["train", "eval", "other"], "train", "eval", "train is the training split and eval the test split"),
    ],
)
@pytest.mark.parametrize("arrays", [False, True])
def test_splits_under_their_usual_names(names, train, test, words, arrays, tmp_path, capsys):
    """With classes in each, which have the same names."""
    for level, name in enumerate(names):
        images = np.full((4, 8, 8), level, np.uint8)
        if arrays:
            np.savez(tmp_path / f"{name}.NPZ", images=images, labels=np.array(["a", "b"] * 2))
            os.replace(tmp_path / f"{name}.NPZ.npz", tmp_path / f"{name}.NPZ")
        else:
            write_images(tmp_path / name / "a", images[:2])
            write_images(tmp_path / name / "b", images[:2])
    data = load_dataset("ImageFolder", tmp_path, image_size=8)
    assert set(levels(data.train)) == {names.index(train)} and set(levels(data.test)) == {names.index(test)}
    assert len(data.train) == len(data.test) == 4 and data.class_names == ("a", "b")
    said = capsys.readouterr().err.replace(".NPZ", "")
    assert said.count("\n") == bool(words) and words in said and (not said or said.startswith(f"note: of {tmp_path}, "))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Train", "TRN", "test"], "has TRN and Train, which could be the same split: rename all but one"),
        (["train", "valid", "dev"], "has dev and valid, which could be the same split"),
        (["val", "test"], "has test and val: if they are splits, name them train and test; else rename them"),
        (["Train", "training"], "has Train and training: if they are splits, name them train and test"),
        (["archive/train", "archive/test"], "archive has test and train: if they are splits, make it the data path"),
        (["cat/Train", "cat/Valid", "dog/Train", "dog/Valid"], "cat has Train and Valid: if they are splits"),
    ],
)
def test_splits_that_are_not_plain(names, words, tmp_path):
    for name in names:
        write_images(tmp_path / name, noise(2, 8, 8))
    message = complaint("ImageFolder", tmp_path, image_size=8)
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("name", ["train", "Test", "validation"])
def test_one_split_alone_is_the_data_set(name, tmp_path, capsys):
    write_classes(tmp_path / name, {"a": 10, "b": 10})
    data = load_dataset("ImageFolder", tmp_path, image_size=8)
    assert (len(data.train), len(data.test), data.class_names) == (18, 2, ("a", "b"))
    said = capsys.readouterr().err
    assert said == f"note: {tmp_path} has no split but {name}: every tenth of its images is a test image\n"


@pytest.mark.parametrize("name", ["Train", "valid"])
def test_a_class_may_have_the_name_of_a_split(name, tmp_path, capsys):
    write_classes(tmp_path, {name: 3, "invalid": 3, "bus": 3})
    assert set(load_dataset("ImageFolder", tmp_path, image_size=8).class_names) == {name, "invalid", "bus"}
    assert f"note: {name} in {tmp_path} is read like the images beside it" in capsys.readouterr().err


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_array_file_is_in_one_split_only(tmp_path, link):
    np.save(tmp_path / "train.npy", noise(3, 8, 8))
    link(tmp_path / "train.npy", tmp_path / "test.npy")
    assert "is the same file as" in complaint("ImageFolder", tmp_path, image_size=8)


# ---- labels in array files ----


@pytest.mark.parametrize(
    ("labels", "class_names", "names", "numbers"),
    [
        ([3, 10, 7], None, ("3", "7", "10"), [0, 2, 1]),
        (["sea", "ant", "sea"], None, ("ant", "sea"), [1, 0, 1]),
        ([2, 0, 2], ["sea", "unused", "ant"], ("sea", "ant"), [1, 0, 1]),
        (["sea", "ant", "sea"], ["sea", "ant"], ("sea", "ant"), [0, 1, 0]),
        ([True, False, True], ["no", "yes"], ("no", "yes"), [1, 0, 1]),
        ([[3], [10], [7]], None, ("3", "7", "10"), [0, 2, 1]),
        (np.array([1, 0, 1], np.uint8), None, ("0", "1"), [1, 0, 1]),
        ([5, 5, 5], None, None, None),
    ],
)
def test_labels_of_an_array_file(labels, class_names, names, numbers, tmp_path):
    """Each image goes with its label, in both splits and in whatever order they are read."""
    count, labels = 30, np.concatenate([np.array(labels)] * 10)
    images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None], (1, 8, 8))
    more = {} if class_names is None else {"class_names": np.array(class_names)}
    np.savez(tmp_path / "a.npz", images=images, labels=labels, **more)
    data = load_dataset("ImageFolder", tmp_path / "a.npz", image_size=8)
    assert data.class_names == names and levels(data.test)[0] in (0, 10, 20) and len(data.test) == 3
    if names:
        for pixels, own in ((data.train, data.train_labels), (data.test, data.test_labels)):
            assert own.dtype == torch.int64 and own.tolist() == [numbers[level % 3] for level in levels(pixels)]
    else:
        assert data.train_labels is data.test_labels is None


def test_part_of_an_array_is_of_all_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(80, 8, 8), labels=np.repeat(np.arange(8), 10))
    labels = load_dataset("ImageFolder", tmp_path / "a.npz", image_size=8, train_images=16).train_labels
    assert labels.bincount().tolist() == [2] * 8


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": np.arange(3)}, "has 4 images, but labels of the shape [3]: save one label for each image"),
        ({"labels": np.eye(4)}, "labels of the shape [4, 4]"),
        ({"labels": np.arange(4.0)}, "labels of the type float64: save whole numbers from 0, or names"),
        ({"labels": np.array([b"a"] * 4)}, "labels of the type |S1"),
        ({"labels": np.arange(4) - 1}, "the label -1, which is not from 0"),
        (
            {"labels": np.arange(4), "class_names": np.array(["a", "b"])},
            "the label 2, which is not one of its 2",
        ),
        ({"labels": np.arange(4) - 1, "class_names": np.array(list("abcd"))}, "label -1, which is not one of its 4"),
        ({"labels": np.array(list("abcx")), "class_names": np.array(list("abc"))}, "the label x, which is not one of"),
        ({"labels": np.arange(4), "class_names": np.array(list("abca"))}, "two class_names that are the same"),
        ({"labels": np.array([{}] * 4)}, "cannot read the labels in"),
    ],
)
def test_labels_that_do_not_fit(arrays, words, tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(4, 8, 8), **arrays)
    message = complaint("ImageFolder", tmp_path / "a.npz", image_size=8)
    assert words in message and str(tmp_path / "a.npz") in message


def test_an_array_that_may_hold_labels_is_not_ignored_in_silence(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=noise(20, 8, 8), targets=[0, 1] * 10)
    assert load_dataset("ImageFolder", tmp_path / "a.npz", image_size=8).train_labels is None
    assert "an array targets, which is not used" in capsys.readouterr().err


def test_labels_of_two_array_files(tmp_path):
    """Classes are matched by name, whatever their numbers; the test images have no others."""
    np.savez(tmp_path / "train.npz", images=noise(4, 8, 8), labels=[0, 1, 2, 0], class_names=["x", "y", "z"])
    np.savez(tmp_path / "test.npz", images=noise(2, 8, 8), labels=[0, 1], class_names=["z", "x"])
    data = load_dataset("ImageFolder", tmp_path, image_size=8)
    assert data.class_names == ("x", "y", "z") and data.test_labels.sort().values.tolist() == [0, 2]
    np.savez(tmp_path / "test.npz", images=noise(2, 8, 8), labels=["x", "new"])
    assert "labels that no training image has (new)" in complaint("ImageFolder", tmp_path, image_size=8)
    np.savez(tmp_path / "train.npz", images=noise(4, 8, 8))
    assert "labels that no training image has (new, x)" in complaint("ImageFolder", tmp_path, image_size=8)
    np.savez(tmp_path / "test.npz", images=noise(2, 8, 8))
    assert load_dataset("ImageFolder", tmp_path, image_size=8).class_names is None
