"""The library: arrays in and out, the same results as the command line, and the example of the README."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL

from datasets import load_dataset
from errors import UserError
from pipeline.checkpoints import load_weights
from spiking_diffusion import SpikingDiffusion, evaluate, open_session, train_autoencoder, train_denoiser

README = ROOT / "README.md"


@pytest.fixture(autouse=True)
def one_thread():
    """As the command line runs in these tests: bit for bit the same takes the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(finished):
    return SpikingDiffusion.load(finished.path, device="cpu", precision="float32")


def test_the_readme_example_runs(monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(README.parent)
    names = {}
    exec(example, names)
    images, codes = names["images"], names["codes"]
    assert images.shape == names["restored"].shape == names["completed"].shape == (16, 1, 28, 28)
    assert codes.shape == (16, 14, 14) and codes.dtype == np.int64 and images.dtype == np.uint8
    assert np.array_equal(names["completed"][..., :14], images[..., :14])


def test_samples_are_those_of_the_command_line(model, finished):
    with np.load(finished.path / "samples" / "images.npz") as archive:
        assert np.array_equal(model.sample(5).transpose(0, 2, 3, 1), archive["images"])
    assert np.array_equal(model.sample(2, seed=42), model.sample(2)), "the seed of the run"


def test_an_image_does_not_depend_on_the_others(finished, float64):
    model = SpikingDiffusion.load(finished.path, device="cpu", precision="float32")
    images = model.sample(5, seed=7)
    assert np.array_equal(model.sample(3, seed=7), images[:3])
    hidden = np.zeros((16, 16), bool)
    hidden[:, 8:] = True
    completed = model.inpaint(images, hidden, seed=1)
    assert np.array_equal(completed[..., :8], images[..., :8])
    assert np.array_equal(model.inpaint(images[:2], hidden, seed=1), completed[:2])


def test_a_run_whose_feature_networks_have_moved_away_still_draws(run, cli):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"fad_weights": str(run / "gone")}))
    assert SpikingDiffusion.load(run, device="cpu").sample(1).shape[0] == 1
    assert cli("--checkpoint", run, "--stage", "sample", "--num_samples", 1).status == 0
    outcome = cli("--checkpoint", run)
    assert outcome.status == 2 and "gone does not exist" in outcome.err


def test_codes_and_back(model, grey):
    images = load_dataset("ImageFolder", grey[3], image_size=16).test.numpy()
    codes = model.encode(images)
    assert codes.shape == (4, 4, 4) and codes.dtype == np.int64
    assert model.decode(codes).shape == images.shape and model.decode(codes).dtype == np.uint8
    assert np.array_equal(model.decode(codes[:, :, ::1].astype(np.int16)), model.decode(codes))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda model: model.encode(np.zeros((2, 1, 16, 16))),
        lambda model: model.encode(np.zeros((2, 16, 16), np.uint8)),
        lambda model: model.encode(np.zeros((2, 3, 16, 16), np.uint8)),
        lambda model: model.decode(np.zeros((2, 5, 4), np.int64)),
        lambda model: model.decode(np.full((2, 4, 4), 8)),
        lambda model: model.decode(np.full((2, 4, 4), -1)),
        lambda model: model.decode(np.full((2, 4, 4), 3.7)),
        lambda model: model.decode(np.zeros((0, 4, 4), np.int64)),
        lambda model: model.encode(np.zeros((0, 1, 16, 16), np.uint8)),
        lambda model: model.sample(0),
        lambda model: model.inpaint(np.zeros((2, 1, 16, 16), np.uint8), np.zeros((16, 16))),
        lambda model: model.inpaint(np.zeros((2, 1, 16, 16), np.uint8), np.zeros((8, 16), bool)),
    ],
)
def test_arrays_that_do_not_fit(mistake, model):
    with pytest.raises(ValueError, match=r"expected|must be"):
        mistake(model)


def test_a_model_that_is_not_there(tmp_path, finished):
    with pytest.raises(UserError, match="does not exist"):
        SpikingDiffusion.load(tmp_path / "none")
    with pytest.raises(UserError, match="--seed: '-1' is not from 0"):
        SpikingDiffusion.load(finished.path).sample(1, seed=-1)
    with pytest.raises(UserError, match="no option temprature"):
        SpikingDiffusion.load(finished.path, temprature=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "imporved"}, "--preset is imporved, not one of faithful, improved"),
        ({"loss": "elbow"}, "--loss is elbow, not one of"),
        ({"epochs": 0}, "--epochs: '0' is not from 1 to 1000000000, a whole number"),
        ({"epochs": None}, "--epochs is None, not of type int"),
        ({"sort_codes": 1}, "--sort_codes is 1, not of type bool"),
        ({"temperature": -1.0}, "--temperature: '-1.0' is not greater than 0"),
        ({"metrics": ["fad", "fod"]}, "--metrics: unknown metric 'fod'"),
    ],
)
def test_options_are_checked_as_if_they_were_typed(options, message):
    with pytest.raises(UserError, match=message):
        open_session(**options)


def test_a_run_may_be_named_by_text(finished):
    options = open_session(start_from=str(finished.path), stage="sdid", result_path="elsewhere").options
    assert options.run.start_from == finished.path and options.run.result_path == Path("elsewhere")


def test_training_and_evaluation(small, finished, tmp_path, grey):
    """The same weights as the command line's, and metrics of the images that were drawn."""
    data = load_dataset("ImageFolder", grey[3], image_size=16)
    words = small[len(grey) :]
    switches = {"--revive_codes": True, "--clipped_error": True}
    options = {word[2:]: value for word, value in switches.items() if word in words}
    plain = [word for word in words if word not in switches]
    options |= {name[2:]: value for name, value in zip(plain[::2], plain[1::2], strict=True)}
    options |= {"data_path": grey[3], "image_size": 16}
    for strange, message in (
        (replace(data, name="mine"), "have the name ImageFolder"),
        (replace(data, train=data.train[..., :15]), "images of 15x16 pixels: both sides must be multiples"),
    ):
        with pytest.raises(UserError, match=message):
            train_autoencoder(strange, tmp_path / "strange", **options)
    run = train_autoencoder(data, tmp_path, **options)
    assert train_denoiser(data, tmp_path, **options) == run
    for name in ("model.pth", "diff_result/diff_model.pth"):
        ours, theirs = load_weights(run / name), load_weights(finished.path / name)
        assert all((ours[key] == theirs[key]).all() for key in theirs), name
    images = SpikingDiffusion.load(run, device="cpu", precision="float32").sample(5)
    with pytest.raises(UserError, match="needs at least 5000 generated images, not 5"):
        evaluate(images, data, ("fad",), device="cpu")
    for unknown in (("fadd",), ("mse", "fad"), "fad"):
        with pytest.raises(UserError, match="no metric of images is named"):
            evaluate(images, data, unknown, device="cpu")
    with pytest.raises(UserError, match="the evaluation has no option fad_weigths"):
        evaluate(images, data, ("classifier",), device="cpu", fad_weigths="somewhere")
    assert "--num_samples" in SMALL and evaluate(images, data, device="cpu") == []
