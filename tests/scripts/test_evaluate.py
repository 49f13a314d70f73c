"""scripts/evaluate.py: images in any form, and the mistakes one can make."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from datasets import load_dataset
from errors import UserError
from metrics.extraction import extract
from metrics.frechet import feature_statistics, frechet_distance
from pipeline.evaluation import image_records
from pipeline.evaluation.loaders import FeatureNetwork
from pipeline.evaluation.protocols import Metric
from scripts import evaluate


def random_images(count, channels=3, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def write_folder(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{number:05d}.png")
    return folder


def write_npz(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images)
    return path


class Pixels(torch.nn.Module):
    """Stands for a feature network: the first pixels of an image."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1)[:, :8].float() * self.scale


def pixels(images, network, progress=None):
    return extract(images, network, network, 7, progress)


def distance(generated, real):
    return frechet_distance(*feature_statistics(generated), *feature_statistics(real))


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    """One metric on the stand-in, as the FID is on Inception."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_records, "LOADERS", {"pixels": lambda *_: FeatureNetwork(Pixels(), pixels, "pixels")})
    metric = Metric("pixels", 5, 5, lambda seen: {"fid": distance(seen.generated, seen.real)}, at_least=True)
    monkeypatch.setattr(image_records, "GENERATED_METRICS", {"fid": metric})


def records(*arguments):
    return evaluate.evaluate(evaluate.parse([str(argument) for argument in (*arguments, "--device", "cpu")]))


def mistake(capsys, *arguments):
    """The one line that a mistake of the user leaves on stderr."""
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_archive_and_memory_give_the_same_metric(channels, tmp_path, capsys):
    generated, real = random_images(12, channels), random_images(9, channels, seed=1) // 4
    folders = [write_folder(tmp_path / name, images) for name, images in (("g", generated), ("r", real))]
    archives = [write_npz(tmp_path / f"{name}.npz", images) for name, images in (("g", generated), ("r", real))]
    in_memory = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (generated, real)]
    expected = distance(*(pixels(images, Pixels()) for images in in_memory))
    for sides in (archives, folders, (folders[0], archives[1])):
        (record,) = records(*sides)
        assert record["value"] == pytest.approx(expected) and expected > 1
        assert (record["num_generated"], record["num_real"]) == (12, 9) and str(sides[0]) in record["drawn"]
    evaluate.main([str(archives[0]), str(archives[1]), "--output", str(tmp_path / "records.json"), "--device", "cpu"])
    assert json.loads((tmp_path / "records.json").read_text()) == records(*archives)
    assert f"{expected:.4f}" in capsys.readouterr().out


def test_a_run_against_its_data_set(run, grey):
    with np.load(run / "samples" / "images.npz") as archive:
        images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
    test = load_dataset("ImageFolder", grey[3], image_size=16)
    (record,) = records(run, "--reference", "train")
    assert record["value"] == pytest.approx(distance(pixels(images, Pixels()), pixels(test.train, Pixels())))
    assert (record["split"], record["num_real"]) == ("train", 120)


def test_a_run_whose_data_set_is_elsewhere(run, grey):
    """A packed run does not say where."""
    expected = records(run)
    config = json.loads((run / "config.json").read_text())
    del config["data_path"]
    (run / "config.json").write_text(json.dumps(config))
    assert records(run, "--data_path", grey[3]) == expected


def test_samples_that_a_checkpoint_left_elsewhere(cli, run, grey, tmp_path):
    expected = records(run, "--reference", "train")
    assert cli("--checkpoint", run, "--result_path", tmp_path / "elsewhere", "--num_samples", 5).status == 0
    (record,) = records(tmp_path / "elsewhere", "--reference", "train")
    assert record["value"] == expected[0]["value"]


def test_metrics_say_what_they_were_computed_with(run):
    (record,) = records(run, "--reference", "train")
    assert record["precision"] == "float32" and record["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] and record["processor"]


def test_images_against_a_data_set(tmp_path):
    images = write_folder(tmp_path / "images", random_images(6, channels=1, size=28))
    (record,) = records(images, "--dataset_name", "Digits")
    assert record["num_real"] == 360 and record["value"] > 0


def test_training_images_stand_in_for_generated_ones(monkeypatch, capsys):
    data = load_dataset("Digits", "data")
    few = ("--num_samples", 30)
    first, again, other = (records("--dataset_name", "Digits", *few, "--seed", seed)[0] for seed in (1, 1, 2))
    chosen = torch.randperm(1437, generator=torch.Generator().manual_seed(1))[:30]
    assert first["value"] == pytest.approx(distance(pixels(data.train[chosen], Pixels()), pixels(data.test, Pixels())))
    assert (first["num_generated"], first["drawn"]) == (30, "random training images")
    assert again == first and other["value"] != first["value"]
    monkeypatch.setattr(evaluate, "FID_IMAGES", 40)
    assert records("--dataset_name", "Digits")[0]["num_generated"] == 40
    (kept,) = records("--dataset_name", "Digits", *few, "--seed", 1, "--held_out", 100)
    assert kept["value"] != first["value"], "chosen from the others"
    assert "nothing to evaluate" in mistake(capsys)
    assert "--held_out is for --dataset_name" in mistake(capsys, "a", "b", "--held_out", 5)


def test_the_first_of_many_images(tmp_path):
    images = random_images(9)
    sides = write_npz(tmp_path / "g.npz", images), write_npz(tmp_path / "r.npz", random_images(8, seed=1))
    first = records(write_npz(tmp_path / "first.npz", images[:6]), sides[1])[0]
    (record,) = records(*sides, "--num_samples", 6)
    assert (record["num_generated"], record["value"]) == (6, first["value"])


def test_sizes_and_colours_must_be_alike(tmp_path, capsys):
    colour, grey = (
        write_npz(tmp_path / "c.npz", random_images(6)),
        write_npz(tmp_path / "g.npz", random_images(6, 1)),
    )
    small = write_npz(tmp_path / "s.npz", random_images(6, size=8))
    assert "have colours" in mistake(capsys, colour, grey)
    assert "[16, 16]" in mistake(capsys, colour, small)
    assert len(records(grey, colour)) == 1  # grey is repeated


def test_odd_image_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "folder", random_images(2))
    Image.new("RGB", (16, 20)).save(folder / "odd.png")
    assert f"{folder / 'odd.png'} is 16x20" in mistake(capsys, folder, folder)


def test_unreadable_image_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "folder", random_images(2))
    (folder / "broken.png").write_bytes((folder / "00000.png").read_bytes()[:60])
    assert "broken.png" in mistake(capsys, folder, folder)


def test_folder_without_images(tmp_path, capsys):
    assert f"{tmp_path} holds 0 images" in mistake(capsys, tmp_path, tmp_path)


def test_subfolders_are_searched(tmp_path):
    images = random_images(7)
    write_folder(tmp_path / "folder" / "a", images[:3])
    write_folder(tmp_path / "folder" / "b", images[3:])
    assert records(tmp_path / "folder", write_npz(tmp_path / "all.npz", images))[0]["num_generated"] == 7


def test_the_first_images_are_of_all_folders(tmp_path):
    for level in range(4):
        write_folder(tmp_path / f"class {level}", np.full((3, 16, 16, 3), level, np.uint8))
    assert sorted(evaluate.load_images(tmp_path)[:4, 0, 0, 0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("arrays", [{"pictures": np.zeros(3)}, {"images": np.zeros((2, 8, 8, 3))}])
def test_npz_with_something_else(arrays, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **arrays)
    assert "other.npz" in mistake(capsys, tmp_path / "other.npz", tmp_path / "other.npz")


@pytest.mark.parametrize("config", [None, "{", "[]", '{"dataset_name": "mnist"}'])
def test_folder_that_is_no_run(config, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert "config.json" in mistake(capsys, tmp_path)


def test_run_without_samples(run, capsys):
    (run / "samples" / "images.npz").unlink()
    assert "images.npz" in mistake(capsys, run)


def test_two_real_sides(tmp_path, capsys):
    assert "leave one out" in mistake(capsys, tmp_path, tmp_path, "--dataset_name", "Digits")


def test_options_are_checked(tmp_path, capsys):
    with pytest.raises(UserError, match="cuda:N"):
        evaluate.evaluate(evaluate.parse([str(tmp_path), str(tmp_path), "--device", "tpu?"]))


@pytest.mark.parametrize("case", ["missing folder", "too few images", "wrong weights"])
def test_mistakes_on_the_command_line(case, tmp_path):
    count = 129 - (case == "too few images")
    generated = write_npz(tmp_path / "generated.npz", np.zeros((count, 2, 2, 1), dtype=np.uint8))
    real = write_npz(tmp_path / "real.npz", np.zeros((129, 2, 2, 1), dtype=np.uint8))
    weights = tmp_path / "weights.pth"
    weights.write_text("not weights")
    generated = tmp_path / "nowhere" if case == "missing folder" else generated
    command = [sys.executable, "scripts/evaluate.py", generated, real, "--metrics", "fid", "--fid_weights", weights]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    expected = {
        "missing folder": "nowhere",
        "too few images": "at least 129 generated images, not 128",
        "wrong weights": "--fid_weights PATH",
    }
    assert expected[case] in process.stderr
