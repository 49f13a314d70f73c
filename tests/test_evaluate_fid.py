import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import metrics.fid
from errors import UserError
from metrics.fid import fid
from metrics.frechet import feature_statistics
from metrics.inception import load_inception
from scripts import evaluate_fid

ROOT = Path(__file__).resolve().parents[1]


def random_pictures(count, channels=3, size=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def write_folder(folder, pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze()).save(folder / f"{number:05d}.png")
    return folder


def write_npz(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=pictures)
    return path


def mistake(capsys, *arguments):
    """The one line that a mistake of the user leaves on stderr."""
    with pytest.raises(SystemExit) as exit_:
        evaluate_fid.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_folder_and_npz_give_the_same_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.fid, "FEWEST_IMAGES", 3)
    # 64 of the 2,048 features: the roots of the whole matrices take ten seconds
    monkeypatch.setattr(metrics.fid, "feature_statistics", lambda f: feature_statistics(f[:, :64]))
    torch.manual_seed(0)
    weights = tmp_path / "random.pth"
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # keeps the signal alive
    torch.save(network.state_dict(), weights)
    generated, real = random_pictures(3), random_pictures(3, seed=1) // 4
    folder, archive = write_folder(tmp_path / "generated", generated), write_npz(tmp_path / "real.npz", real)

    evaluate_fid.main([str(folder), str(archive), "--fid_weights", str(weights), "--device", "cpu"])
    line = capsys.readouterr().out
    in_memory = (torch.from_numpy(pictures).permute(0, 3, 1, 2) for pictures in (generated, real))
    expected = fid(*in_memory, load_inception(weights, "cpu"))
    assert float(re.match(r"FID (\S+) ", line).group(1)) == pytest.approx(expected, rel=1e-3) and expected > 0.1
    for part in ("generated: 3 images", "real: 3 images", str(folder), str(archive), str(weights)):
        assert part in line


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_npz_hold_the_same_pictures(channels, tmp_path):
    pictures = random_pictures(4, channels)
    from_folder = evaluate_fid.load_pictures(write_folder(tmp_path / "folder", pictures))
    from_npz = evaluate_fid.load_pictures(write_npz(tmp_path / "pictures.npz", pictures))
    assert from_npz.shape == (4, channels, 16, 16) and from_npz.dtype == torch.uint8
    assert torch.equal(from_folder, from_npz.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("split", ["test", "train"])
def test_run_folder(split, tmp_path, monkeypatch, capsys):
    splits = SimpleNamespace(train=torch.zeros(6, 1, 28, 28), test=torch.zeros(5, 1, 28, 28))
    asked, scored = [], []
    monkeypatch.setattr(evaluate_fid, "load_dataset", lambda *a, **k: asked.append((a, k)) or splits)
    monkeypatch.setattr(evaluate_fid, "check_enough", lambda *_: None)
    monkeypatch.setattr(evaluate_fid, "load_inception", lambda *_: None)
    monkeypatch.setattr(evaluate_fid, "fid", lambda *a: scored.append(a) or 12.5)
    write_npz(tmp_path / "samples" / "images.npz", random_pictures(4, channels=1, size=28))
    config = {"dataset_name": "mnist", "data_path": "data", "image_size": 28, "channels": 1, "model": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    evaluate_fid.main([str(tmp_path), "--split", split])
    assert asked == [(("mnist", "data"), {"image_size": 28, "channels": 1})]
    generated, real, *_ = scored[0]
    assert generated.shape == (4, 1, 28, 28) and real is getattr(splits, split)
    line = capsys.readouterr().out
    assert line.startswith("FID 12.5") and f"real: {len(real)} images, mnist {split} split" in line


def test_odd_picture_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "folder", random_pictures(2))
    Image.new("RGB", (16, 20)).save(folder / "odd.png")
    assert f"{folder / 'odd.png'} is 16x20" in mistake(capsys, folder, folder)


def test_unreadable_picture_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "folder", random_pictures(2))
    (folder / "broken.png").write_bytes((folder / "00000.png").read_bytes()[:60])
    assert "broken.png" in mistake(capsys, folder, folder)


def test_folder_without_pictures(tmp_path, capsys):
    assert f"no pictures in {tmp_path}" in mistake(capsys, tmp_path, tmp_path)


@pytest.mark.parametrize("arrays", [{"pictures": np.zeros(3)}, {"images": np.zeros((2, 8, 8, 3))}])
def test_npz_with_something_else(arrays, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **arrays)
    assert "other.npz" in mistake(capsys, tmp_path / "other.npz", tmp_path)


@pytest.mark.parametrize("config", [None, "{", "[]", '{"dataset_name": "mnist"}'])
def test_folder_that_is_no_run(config, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert "config.json" in mistake(capsys, tmp_path)


def test_run_without_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_fid, "load_dataset", lambda *_, **__: SimpleNamespace(test=torch.zeros(1)))
    config = {"dataset_name": "mnist", "data_path": None, "image_size": 28, "channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "images.npz" in mistake(capsys, tmp_path)


def test_options_are_checked(tmp_path, capsys):
    assert "--batch_size" in mistake(capsys, tmp_path, tmp_path, "--batch_size", 0)
    assert "cuda:N" in mistake(capsys, tmp_path, tmp_path, "--device", "tpu?")
    with pytest.raises(UserError, match="CUDA devices"):
        evaluate_fid.find_device("cuda:99")


@pytest.mark.parametrize("case", ["missing folder", "too few pictures", "wrong weights"])
def test_mistakes_on_the_command_line(case, tmp_path):
    count = metrics.fid.FEWEST_IMAGES - (case == "too few pictures")
    pictures = write_npz(tmp_path / "pictures.npz", np.zeros((count, 2, 2, 1), dtype=np.uint8))
    weights = tmp_path / "weights.pth"
    weights.write_text("not weights")
    generated = tmp_path / "nowhere" if case == "missing folder" else pictures
    command = [sys.executable, "scripts/evaluate_fid.py", generated, pictures, "--fid_weights", weights]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    expected = {
        "missing folder": "nowhere",
        "too few pictures": "not 2047",
        "wrong weights": "--fid_weights PATH",
    }
    assert expected[case] in process.stderr
