"""The library: arrays in and out, the same results as the command line, and the example of the README."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL

from datasets import load_dataset
from errors import UserError
from pipeline.checkpoints import load_weights
from pipeline.from_python import in_python
from pipeline.session import open_session
from spiking_diffusion import SpikingDiffusion, evaluate, image_data, train_autoencoder, train_denoiser

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
    assert codes.shape == (16, 28, 28) and codes.dtype == np.int64 and images.dtype == np.uint8
    assert np.array_equal(names["completed"][..., :14], images[..., :14])


def test_samples_are_those_of_the_command_line(model, finished):
    with np.load(finished.path / "samples" / "images.npz") as archive:
        assert np.array_equal(model.sample(5).transpose(0, 2, 3, 1), archive["images"])
    assert np.array_equal(model.sample(2, seed=42), model.sample(2)), "the seed of the run"


def in_type(model, dtype):
    """A copy of a model whose networks are of another type."""
    networks = {name: deepcopy(getattr(model.model, name)).to(dtype) for name in ("autoencoder", "denoiser")}
    return SpikingDiffusion(replace(model.model, **networks))


def test_an_image_does_not_depend_on_the_others(model):
    model = in_type(model, torch.float64)  # whose rounding changes no spike
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
    with pytest.raises(UserError, match=r"^seed: '-1' is not from 0"):
        SpikingDiffusion.load(finished.path).sample(1, seed=-1)
    with pytest.raises(UserError, match="no option temprature"):
        SpikingDiffusion.load(finished.path, temprature=1)
    with pytest.raises(UserError, match="by itself: leave out num_samples, png"):
        SpikingDiffusion.load(finished.path, png=True, num_samples=3)
    with pytest.raises(UserError, match=r"^epochs has no effect in SpikingDiffusion, only in main.py or in train_auto"):
        SpikingDiffusion.load(finished.path, epochs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "imporved"}, "--preset is imporved, not one of faithful, improved"),
        ({"loss": "elbow"}, "--loss is elbow, not one of"),
        ({"epochs": 0}, "--epochs: '0' is not from 1 to 1000000000, a whole number"),
        ({"epochs": None}, "--epochs is None, not of type int"),
        ({"epochs": True}, "--epochs is True, not of type int"),
        ({"temperature": None}, "--temperature is None, not of type float or str"),
        ({"lr": None}, "--lr is None, not of type float"),
        ({"result_path": b"result"}, "--result_path is b'result', not of type Path or None"),
        ({"fid_weights": 5}, "--fid_weights is 5, not of type Path or None"),
        ({"checkpoint": 5}, "--checkpoint is 5, not of type Path or None"),
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
    for strange, message in (
        (replace(data, name="mine"), "have the name ImageFolder"),
        (replace(data, train=data.train[..., :15], test=data.test[..., :15]), "images of 15x16 pixels: both sides"),
    ):
        with pytest.raises(UserError, match=message):
            train_autoencoder(strange, tmp_path / "strange", **options)
    run = train_autoencoder(data, tmp_path, **options)
    assert train_denoiser(data, tmp_path, **options) == run
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (run, finished.path))
    for key in (
        "dataset_name",
        "data_path",
        "train_images",
        "held_out",
        "image_size",
        "channels",
        "data",
        "image_shape",
    ):
        assert ours[key] == theirs[key], key
    for name in ("model.pth", "diff_result/diff_model.pth"):
        ours, theirs = load_weights(run / name), load_weights(finished.path / name)
        assert all((ours[key] == theirs[key]).all() for key in theirs), name
    images = SpikingDiffusion.load(run, device="cpu", precision="float32").sample(5)
    for named in (("fad",), ["fad"], "fad", np.array(["fad"])):
        with pytest.raises(UserError, match="needs at least 65 generated images, not 5"):
            evaluate(images, data, named, device="cpu")
    for unknown in (("fadd",), ("mse", "fad"), "fad,mse"):
        with pytest.raises(UserError, match="no metric of images is named"):
            evaluate(images, data, unknown, device="cpu")
    with pytest.raises(UserError, match="the evaluation has no option fad_weigths"):
        evaluate(images, data, ("classifier",), device="cpu", fad_weigths="somewhere")
    assert "--num_samples" in SMALL and evaluate(images, data, device="cpu") == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_copies_of_another_type_compute(dtype, precision, finished, grey):
    """Nearly the same: a spike at the threshold may be another, so half of the pixels agree well."""
    images = load_dataset("ImageFolder", grey[3], image_size=16).test
    model = SpikingDiffusion.load(finished.path, device="cpu", precision="float32")
    copy = in_type(SpikingDiffusion.load(finished.path, device="cpu", precision=precision), dtype)
    ours, theirs = model.decode(model.encode(images)), copy.decode(copy.encode(images))
    assert np.median(np.abs(ours.astype(int) - theirs)) < 40
    drawn = copy.sample(3, seed=1)
    assert drawn.shape == (3, 1, 16, 16) and drawn.dtype == np.uint8
    assert copy.inpaint(images, [[x > 7 for x in range(16)]] * 16).shape == images.shape


def test_samples_at_other_settings_are_those_of_a_model_loaded_with_them(model, finished):
    settings = {"temperature": 2.0, "final_temperature": 0.5, "sample_steps": 3, "reveal_order": "spread"}
    images = model.sample(5, **settings)
    loaded = SpikingDiffusion.load(finished.path, device="cpu", precision="float32", **settings)
    assert np.array_equal(images, loaded.sample(5)) and not np.array_equal(images, model.sample(5))
    hidden = np.eye(16, dtype=np.uint8)
    assert np.array_equal(model.inpaint(images, hidden, **settings), loaded.inpaint(images, hidden))


def test_labels_in_every_form(tmp_path, classes):
    data = load_dataset("ImageFolder", classes[3], image_size=16)
    plain = [word for word in (*SMALL, "--denoiser_channels", 16) if word not in ("--num_samples", 5)]
    options = {name[2:]: value for name, value in zip(plain[::2], plain[1::2], strict=True)}
    options |= {"denoiser": "residual", "denoiser_blocks": 1, "condition": "label", "epochs": 1, "diffusion_epochs": 1}
    train_denoiser(data, train_autoencoder(data, tmp_path, **options).parents[1], **options)
    path = tmp_path / "ImageFolder" / "snn-vq-vae"
    model = SpikingDiffusion.load(path, device="cpu", precision="float32")
    both = model._asked(labels=[0, 1]).settings.labels
    assert both == (0, 1)
    same = ("0,1", "all", "Dark Blue, sea", "0,SEA", ["dark blue", 1], ("0", "1"), range(2), np.array([0, 1]))
    for labels in (
        *same,
        np.array(["0", "sea"]),
        torch.tensor([0, 1]),
        [np.int64(0), np.uint8(1)],
        list(torch.arange(2)),
    ):
        assert model._asked(labels=labels).settings.labels == both, labels
        assert SpikingDiffusion.load(path, device="cpu", labels=labels).model.settings.labels == both, labels
    for labels in (1, np.int64(1), "1", "sea", torch.tensor(1), np.array(1)):
        assert model._asked(labels=labels).settings.labels == (1,), labels
    for wrong in ("3,4", 7, [], "", [0.5]):
        with pytest.raises(UserError, match=r"^(there is no class|no class is named)"):
            model.sample(2, labels=wrong)
    assert len(model.sample(4, labels="0,1", guidance=1)) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample(2.0), "count must be a whole number, at least 1, not 2.0"),
        (lambda model: model.sample("2"), "count must be"),
        (lambda model: model.sample(True), "count must be"),
        (lambda model: model.sample(2, temperature=0), "temperature: '0' is not greater than 0"),
        (lambda model: model.sample(2, temperature="auto"), "temperature must be a number here"),
        (lambda model: model.sample(2, temperature=float("nan")), "temperature: 'nan' is not"),
        (lambda model: model.sample(2, final_temperature=-1), "final_temperature: '-1' is not greater than 0"),
        (lambda model: model.sample(2, sample_steps=17), "images of this size have 16 timesteps: use sample_steps=16"),
        (lambda model: model.sample(2, sample_steps=0), "sample_steps: '0' is not from 1"),
        (lambda model: model.sample(2, reveal_order="left"), "reveal_order is left, not one of random, spread"),
        (lambda model: model.sample(2, temprature=1), "sampling has no setting temprature: choose from seed, temperat"),
        (lambda model: model.sample(2, num_samples=1), "has no setting num_samples: choose from seed, temperature, "),
        (lambda model: model.sample(2, guidance=-1), "guidance: '-1' is not from 0"),
        (lambda model: model.sample(2, guidance=1), "guidance needs a denoiser with a condition"),
        (lambda model: model.sample(2, labels="3,4"), 'train a run with preset="improved"'),
        (lambda model: model.inpaint(np.zeros((1, 1, 16, 16), int), np.zeros((16, 16), bool)), "hidden has no pixel"),
        (lambda model: model.encode(np.zeros((1, 1, 20, 16), np.uint8)), "images must be whole numbers"),
        (lambda model: model.decode("codes"), "codes must be whole numbers from 0 to 7 in the shape [N,4,4], not str"),
    ],
)
def test_arguments_are_checked_and_named(call, message, model):
    with pytest.raises(UserError) as error:
        call(model)
    assert message in str(error.value) and "--" not in str(error.value)


@pytest.fixture
def own():
    pixels = np.random.default_rng(1).integers(0, 256, (12, 1, 16, 16), np.uint8)
    return image_data(pixels, pixels[:4])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"images": np.zeros((9, 1, 20, 20), np.uint8)},
            "images must be whole numbers from 0 to 255 in the shape [N,1,16,16]",
        ),
        ({"images": np.zeros((9, 3, 16, 16), np.uint8)}, "not uint8 [9, 3, 16, 16]"),
        ({"images": np.zeros((9, 1, 16, 16))}, "not float64"),
        ({"images": []}, "images is empty"),
        ({"held_out": 5}, "leave out held_out"),
        ({"train_images": 5, "image_size": 16}, "leave out image_size, train_images"),
        ({"fad_weights": "nowhere"}, "fad_weights nowhere does not exist"),
        ({"reference": "tset"}, "reference is tset, not one of test, train"),
        ({"seed": -1}, "seed: '-1' is not from 0"),
        ({"device": "tpu"}, "device takes auto, cpu, cuda or cuda:N, not tpu"),
        ({"data": np.zeros((9, 1, 16, 16), np.uint8)}, "data must be what load_dataset or image_data returns"),
        ({"metrics": ()}, "metrics: none is named: choose from fid, "),
    ],
)
def test_evaluation_is_checked_before_it_begins(wrong, message, own, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.image_records.Evaluation", None)
    with pytest.raises(UserError) as error:
        evaluate(**{"images": np.zeros((9, 1, 16, 16), np.uint8), "data": own, "device": "cpu", **wrong})
    assert message in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize("train", [train_autoencoder, train_denoiser])
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"train_images": 100}, "leave out train_images"),
        (
            {},
            {"held_out": 2, "data_path": "x", "dataset_name": "Digits"},
            "leave out data_path, dataset_name, held_out",
        ),
        ({}, {"image_size": 16, "channels": 1}, "leave out channels, image_size"),
        ({}, {"stage": "all"}, "leave out stage"),
        ({}, {"report": True}, "leave out report"),
        ({}, {"metrics": "mse"}, ", only in main.py or in evaluate: leave it out"),
        ({}, {"epochs": 0}, "epochs: '0' is not from 1"),
        ({}, {"epcohs": 1}, "there is no option epcohs"),
        ({}, {"device": "cuda:99"}, "device cuda:99: this machine has"),
        ({"train": []}, {}, "data.train is empty"),
        ({"test": []}, {}, "data.test is empty"),
        ({"test": np.zeros((4, 3, 16, 16), np.uint8)}, {}, "data.test must be whole numbers"),
        ({"held_out": np.zeros((4, 1, 20, 20), np.uint8)}, {}, "data.held_out must be whole numbers"),
        ({"train": np.full((12, 1, 16, 16), np.nan)}, {}, "data.train must be whole numbers"),
        ({"train_labels": [1] * 12, "test_labels": [1] * 4}, {}, "data.train_labels begins with class 1"),
        ({"train_labels": [0] * 11, "test_labels": [0] * 4}, {}, "data.train_labels must be whole numbers"),
        ({"name": "mine"}, {}, "images of your own have the name ImageFolder"),
        ({"train": np.zeros((12, 1, 16, 16), np.uint8)}, {}, "one uniform colour"),
    ],
)
def test_training_is_checked_before_it_begins(train, change, options, message, own, tmp_path):
    with pytest.raises(UserError) as error:
        train(replace(own, **change), tmp_path / "result", **{"device": "cpu", **options})
    assert message in str(error.value) and "--" not in str(error.value)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--seed: '-1' is not", "seed: '-1' is not"),
        ("use --sample_steps 16 instead of 50", "use sample_steps=16 instead of 50"),
        ("train with --condition label", 'train with condition="label"'),
        ("--preset is imporved, not one of", "preset is imporved, not one of"),
        (
            "resume it with --resume /a/b, evaluate with --checkpoint /a/b, or choose another --result_path",
            "resume it with resume=/a/b, evaluate with SpikingDiffusion.load /a/b, or choose another result_path",
        ),
        ("resume with: python -u main.py --resume /a/b", "resume with: resume=/a/b"),
        (
            "a denoiser belongs beside it; --stage sdid trains it",
            "a denoiser belongs beside it; train_denoiser trains it",
        ),
        (
            "--temperature auto needs more: train with --held_out 1001",
            "temperature auto needs more: train with held_out=1001",
        ),
        ("a folder named my--seed", "a folder named my--seed"),
        ("add --new_denoiser", "add new_denoiser"),
        ("only in --stage sdid or in --stage inpaint", "only in train_denoiser or in SpikingDiffusion.inpaint"),
        ("--output is no option", "--output is no option"),
    ],
)
def test_messages_are_in_the_words_of_python(message, expected):
    assert in_python(message) == expected
