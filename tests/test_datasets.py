"""Data sets: only files written here, and no network."""

import pickle
import struct
import urllib.request
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import complaint, noise, write_idx
from torchvision.datasets import CIFAR10

from datasets import ImageData, load_dataset
from parts import DATASETS

MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# ---- the table, the record, the options every set shares ----


def test_table_has_the_names_of_the_command_line():
    assert list(DATASETS) == ["MNIST", "FMNIST", "KMNIST", "Letters", "CIFAR10", "Digits", "ImageFolder"]


def test_unknown_name_lists_the_valid_ones(tmp_path):
    message = complaint("mnist", tmp_path)
    assert all(name in message for name in DATASETS)


@pytest.mark.parametrize("shape", [(50, 1, 28, 28), (7, 3, 5, 9)])
def test_variance_is_that_of_float64(shape):
    images = noise(*shape) // 3
    data = ImageData("noise", torch.from_numpy(images), torch.from_numpy(images[:1]), torch.empty(0))
    assert data.variance == pytest.approx((images / np.float64(255)).var(), rel=1e-13)
    assert data.shape == shape[1:]


def test_variance_of_a_transposed_view_and_of_a_constant():
    view = torch.from_numpy(noise(4, 8, 6, 3)).permute(0, 3, 1, 2)
    assert ImageData("view", view, view, view).variance == pytest.approx((view.numpy() / 255).var(), rel=1e-13)
    flat = torch.full((3, 1, 4, 4), 7, dtype=torch.uint8)
    assert ImageData("flat", flat, flat, flat).variance == 0


@pytest.mark.parametrize("option", [{"image_size": 32}, {"channels": 3}])
def test_size_and_channels_are_for_image_folders_only(tmp_path, option):
    message = complaint("Digits", tmp_path, **option)
    assert "ImageFolder" in message and next(iter(option)) in message


@pytest.mark.parametrize("count", [-1, 0, 1438])
def test_train_images_out_of_range_says_how_many_there_are(tmp_path, count):
    assert "1437" in complaint("Digits", tmp_path, train_images=count)


# ---- Digits ----


def test_digits_split_range_and_determinism(tmp_path):
    data, again = load_dataset("Digits", tmp_path / "absent"), load_dataset("Digits", tmp_path)
    assert data.train.shape == (1437, 1, 28, 28) and data.test.shape == (360, 1, 28, 28)
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train.min() == 0 and data.train.max() == 255
    assert torch.equal(data.train, again.train) and torch.equal(data.test, again.test)
    assert not (tmp_path / "absent").exists()
    digests = [data.fingerprint[split]["sha256"] for split in ("train", "test")]
    assert digests == ["b5e108a6fd57d242", "5fd75f4351dfb841"], "the same on every processor"


def test_digits_are_the_bundled_ones_in_order(tmp_path):
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images)[:, None] * 255 / 16
    data = load_dataset("Digits", tmp_path)
    for images, source in ((data.test, small[::5]), (data.train[:4], small[1:5])):
        shrunk = torch.nn.functional.interpolate(images.double(), size=(8, 8), mode="area")
        assert (shrunk - source).abs().mean() < 20  # another image's distance is about 80


def test_digits_train_images_is_a_prefix(tmp_path):
    whole, part = load_dataset("Digits", tmp_path), load_dataset("Digits", tmp_path, train_images=5)
    assert torch.equal(part.train, whole.train[:5]) and torch.equal(part.test, whole.test)


def test_held_out_images_are_spread_evenly_and_not_trained_on(tmp_path):
    whole = load_dataset("Digits", tmp_path, train_images=12)
    data = load_dataset("Digits", tmp_path, train_images=12, held_out=3)
    kept = [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert torch.equal(data.held_out, whole.train[[0, 4, 8]]) and torch.equal(data.train, whole.train[kept])
    assert torch.equal(data.train_labels, whole.train_labels[kept])
    assert torch.equal(data.held_out_labels, whole.train_labels[[0, 4, 8]]) and torch.equal(data.test, whole.test)
    assert len(whole.held_out) == 0
    for count in (12, -1):
        assert f"held_out is {count}" in complaint("Digits", tmp_path, train_images=12, held_out=count)


def test_digits_labels(tmp_path):
    from sklearn.datasets import load_digits

    data, target = load_dataset("Digits", tmp_path), torch.from_numpy(load_digits().target)
    assert torch.equal(data.test_labels, target[::5]) and torch.equal(data.train_labels[:4], target[1:5])
    assert data.class_names == tuple("0123456789")


# ---- sets of torchvision ----


@pytest.mark.parametrize(("name", "folder"), [("MNIST", "MNIST"), ("FMNIST", "FashionMNIST"), ("KMNIST", "KMNIST")])
def test_idx_files_present_load_without_network(tmp_path, name, folder):
    train, test = noise(6, 28, 28), noise(2, 28, 28, seed=1)
    write_idx(tmp_path / folder / "raw", "train", train)
    write_idx(tmp_path / folder / "raw", "t10k", test)
    data = load_dataset(name, str(tmp_path), train_images=4)
    assert np.array_equal(data.train, train[:4, None]) and np.array_equal(data.test, test[:, None])
    assert data.train.dtype == torch.uint8 and data.name == name and data.shape == (1, 28, 28)
    assert data.train_labels.tolist() == [0, 1, 2, 0] and data.test_labels.tolist() == [0, 1]  # numbered from 0
    assert len(data.class_names) == 3
    if name == "FMNIST":
        assert data.class_names == ("Trouser", "Pullover", "Dress")  # those of labels 1 to 3


def test_letters_stand_upright(tmp_path):
    upright = np.zeros((3, 28, 28), np.uint8)
    upright[:, 4, 4:20] = 255  # a bar along the top
    upright[:, 4:9, 4] = 128  # and a short one down the left
    for prefix in ("emnist-letters-train", "emnist-letters-test"):
        write_idx(tmp_path / "EMNIST" / "raw", prefix, upright.transpose(0, 2, 1))
    data = load_dataset("Letters", tmp_path)
    assert np.array_equal(data.train, upright[:, None]) and np.array_equal(data.test, upright[:, None])
    assert data.train.is_contiguous() and data.class_names == ("a", "b", "c")


def test_cifar10_has_its_colours_first(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # checksums of the real files
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["airplane", "automobile"]))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = noise(6, 2, 3, 32, 32)
    for (file, _), batch in zip(CIFAR10.train_list + CIFAR10.test_list, pixels, strict=True):
        entry = {"data": batch.reshape(2, -1), "labels": [0, 1]}
        (folder / file).write_bytes(pickle.dumps(entry))
    data = load_dataset("CIFAR10", tmp_path)
    assert np.array_equal(data.train, pixels[:5].reshape(10, 3, 32, 32))
    assert np.array_equal(data.test, pixels[5]) and data.train.is_contiguous()
    assert data.class_names == ("airplane", "automobile") and data.test_labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("MNIST", "MNIST/raw", MNIST_FILES),
        ("FMNIST", "FashionMNIST/raw", MNIST_FILES),
        ("KMNIST", "KMNIST/raw", MNIST_FILES),
        (
            "Letters",
            "EMNIST/raw",
            ["emnist-letters-train-images-idx3-ubyte", "emnist-letters-test-labels-idx1-ubyte"],
        ),
        ("CIFAR10", "cifar-10-batches-py", ["data_batch_1", "test_batch", "batches.meta"]),
    ],
)
def test_missing_and_no_network_names_files_and_folder(tmp_path, capsys, name, folder, files):
    message = complaint(name, tmp_path / "new")
    assert str(tmp_path / "new" / folder) in message and "no network here" in message
    assert all(file in message for file in files)
    assert capsys.readouterr().out == ""


def test_only_the_missing_file_is_asked_for(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw", prefix, noise(2, 28, 28))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    message = complaint("MNIST", tmp_path)
    assert "t10k-labels-idx1-ubyte" in message and "train-images" not in message


@pytest.mark.parametrize("kept", [0, 3, 10, 16, 1000])
def test_truncated_idx_names_the_folder(tmp_path, kept):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw", prefix, noise(3, 28, 28))
    damaged = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:kept])
    message = complaint("MNIST", tmp_path)
    assert str(damaged.parent) in message and damaged.name in message and "damaged" in message


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_images_and_labels_of_different_counts_are_damage(tmp_path, split):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw", prefix, noise(3, 28, 28))
    labels = tmp_path / "MNIST" / "raw" / f"{split}-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">2i", 2049, 2) + bytes(2))
    message = complaint("MNIST", tmp_path)
    assert "damaged" in message and "3 images have 2 labels" in message and labels.name in message


def test_labels_that_are_no_class_are_damage(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw", prefix, noise(3, 28, 28))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(
        struct.pack(">2i", 2049, 3) + bytes([1, 2, 200])
    )
    assert "damaged" in complaint("MNIST", tmp_path)


def test_data_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in complaint("MNIST", tmp_path / "file")


# ---- fingerprint ----


def test_fingerprint_has_counts_and_digests(tmp_path):
    data = load_dataset("Digits", tmp_path, train_images=50, held_out=10)
    assert {name: split["count"] for name, split in data.fingerprint.items()} == {
        "train": 40,
        "held_out": 10,
        "test": 360,
    }
    digests = [split["sha256"] for split in data.fingerprint.values()]
    assert len(set(digests)) == 3 and all(len(bytes.fromhex(each)) == 8 for each in digests)
    assert load_dataset("Digits", tmp_path, train_images=50, held_out=10).fingerprint == data.fingerprint


@pytest.mark.parametrize("split", ["train", "held_out", "test"])
@pytest.mark.parametrize("part", ["", "_labels"])
def test_fingerprint_changes_with_any_image_or_label(tmp_path, split, part):
    data = load_dataset("Digits", tmp_path, train_images=50, held_out=10)
    changed = getattr(data, split + part).clone()
    changed.view(-1)[7] += 1
    other = replace(data, **{split + part: changed}).fingerprint
    assert [name for name in other if other[name] != data.fingerprint[name]] == [split]
