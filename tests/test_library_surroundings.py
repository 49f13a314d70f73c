"""The library computes the same in any thread and in any mode of torch, and leaves everything as it was."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from helpers import ROOT

from datasets import digest
from errors import UserError
from pipeline.checkpoints import load_weights
from pipeline.evaluation import feature_networks
from pipeline.run_folder import RunFolder
from pipeline.runtime import seeds
from pipeline.training import loop
from pipeline.training.interruption import Interrupted
from spiking_diffusion import SpikingDiffusion, evaluate, image_data, train_autoencoder, train_denoiser
from spiking_diffusion import UserError as Exported

OPTIONS = {
    "spike_steps": 2,
    "hidden_channels": 8,
    "denoiser_channels": 16,
    "codebook_size": 8,
    "embedding_dim": 8,
    "denoiser": "residual",
    "denoiser_blocks": 1,
    "condition": "both",
    "images_per_prototype": 8,
    "batch_size": 8,
    "lr": 0.03,
    "revive_codes": True,
    "clipped_error": True,
    "epochs": 1,
    "diffusion_epochs": 1,
    "device": "cpu",
    "precision": "float32",
}
HIDDEN = [[column >= 8 for column in range(16)] for _ in range(16)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums of one thread, and a classifier that is trained in a moment."""
    monkeypatch.setattr(feature_networks, "FEWEST_STEPS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    pixels = np.random.default_rng(0).integers(0, 2, (40, 1, 4, 4), np.uint8).repeat(4, 2).repeat(4, 3) * 255
    labels = np.arange(40) % 3
    classes = {"train_labels": labels[:24], "test_labels": labels[24:], "class_names": ["a", "b", "c"]}
    return image_data(pixels[:24], pixels[24:], **classes)


def everything(data, folder):
    """What each function of the library returns or writes."""
    run = train_autoencoder(data, folder, **OPTIONS)
    assert train_denoiser(data, folder, **OPTIONS) == run
    model = SpikingDiffusion.load(run, device="cpu", precision="float32")
    images = model.sample(6, temperature=0.9, sample_steps=4, guidance=1, labels="a,2")
    codes = model.encode(images)
    results = [images, codes, model.decode(codes), model.inpaint(images, HIDDEN, seed=3, sample_steps=2)]
    records = evaluate(np.resize(images, (500, 1, 16, 16)), data, "recognition", device="cpu")
    results += [np.array([record["value"] for record in records])]
    weights = [digest(load_weights(path)) for path in (run / "model.pth", run / "diff_result" / "diff_model.pth")]
    return [*weights, *(each.tolist() for each in results)]


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "FEWEST_STEPS", 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        results = everything(data, tmp_path_factory.mktemp("expected"))
        torch.set_num_threads(threads)
    return results


def surroundings():
    """What belongs to the rest of the program."""
    state = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (state[1].tolist(), *state[2:]),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "tf32": [precision() for precision in PRECISIONS],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "numpy errors": np.geterr(),
        "folder": os.getcwd(),
    }


PRECISIONS = [lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision]
if hasattr(torch.backends.cudnn, "conv"):  # of PyTorch 2.9 and later
    LAYERS = (
        *(torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul),
        *(torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul),
    )
    PRECISIONS = [lambda layer=layer: layer.fp32_precision for layer in LAYERS]


@contextmanager
def set_for_a_while(getter, setter, value):
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def newer_settings():
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("needs PyTorch 2.9")
    torch.backends.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"


MODES = {
    "as it is": nullcontext,
    "float64": lambda: set_for_a_while(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: set_for_a_while(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: set_for_a_while(lambda: None, torch.set_default_device, "meta"),
    "device context": lambda: torch.device("meta"),
    "TF32": lambda: set_for_a_while(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "newer settings": newer_settings,
}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_in_any_mode_which_stays(mode, data, expected, tmp_path):
    """Trained, drawn and measured within the mode, with random numbers in use and warnings that are errors."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    with MODES[mode]():
        before = surroundings()
        results = everything(data, tmp_path)
        assert surroundings() == before
    assert results == expected


def test_a_training_in_bfloat16_is_the_same_within_an_autocast_of_the_callers(data, tmp_path):
    """Which keeps the weights that it has rounded until it ends, unless it is told that a step has changed them."""
    options = OPTIONS | {"precision": "bf16", "epochs": 2}
    alone = train_autoencoder(data, tmp_path / "alone", **options)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            within = train_autoencoder(data, tmp_path / f"within {enabled}", **options)
        assert digest(load_weights(within / "model.pth")) == digest(load_weights(alone / "model.pth")), enabled


def test_warnings_are_as_before(data, tmp_path):
    everything(data, tmp_path / "first")  # imports what is needed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        everything(data, tmp_path / "second")
        assert warnings.filters == before


def in_thread(function):
    """What a function returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_the_same_in_another_thread(data, expected, tmp_path):
    before = surroundings()
    assert in_thread(lambda: everything(data, tmp_path)) == expected
    assert surroundings() == before


def test_settings_are_set_back_when_the_last_thread_leaves(data, tmp_path, monkeypatch):
    """One thread is still in training while another, which came later, has ended."""
    model_drawn, seen, step = threading.Event(), [], loop.Trainer._step

    def slow(trainer, *arguments):
        seen.append(torch.get_default_dtype())
        assert model_drawn.wait(60)
        return step(trainer, *arguments)

    run = train_autoencoder(data, tmp_path / "finished", **OPTIONS)
    train_denoiser(data, tmp_path / "finished", **OPTIONS)
    monkeypatch.setattr(loop.Trainer, "_step", slow)
    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=lambda: train_autoencoder(data, tmp_path / "slow", **OPTIONS))
        thread.start()
        while not seen:
            pass
        SpikingDiffusion.load(run, device="cpu").sample(1)
        model_drawn.set()
        thread.join()
        assert set(seen) == {torch.float32} and len(seen) == 3
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_two_threads_draw_at_once_are_of_their_seeds():
    def draw(seed):
        with seeds.seeded(seed):
            return torch.cat([torch.rand(1) for _ in range(2000)]).tolist()

    alone = {seed: draw(seed) for seed in range(4)}
    together = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: draw(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# ---- failures ----


class Fault(Exception):
    pass


def fail(*_, **__):
    raise Fault


PLACES = {
    "before it begins": ("pipeline.stages.check", train_autoencoder),
    "in the first step": ("pipeline.training.loop.Trainer._step", train_autoencoder),
    "in the preview": ("pipeline.training.objectives.show", train_autoencoder),
    "in the log": ("pipeline.run_folder.RunFolder.log", train_denoiser),
    "as codes are encoded": ("pipeline.training.train.encode_images", train_denoiser),
    "in the second stage": ("pipeline.training.loop.Trainer._step", train_denoiser),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_leaves_nothing_behind(place, data, expected, tmp_path, monkeypatch):
    """No lock and no setting; the same process does it again, and the result is the same."""
    name, function = PLACES[place]
    if function is train_denoiser:
        train_autoencoder(data, tmp_path, **OPTIONS)
    before = surroundings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(Fault) as kept:  # the traceback keeps what the function had in hand
            function(data, tmp_path, **OPTIONS)
    assert surroundings() == before and kept
    run = tmp_path / "ImageFolder" / "snn-vq-vae"
    with RunFolder(run) as folder:
        folder.lock()
    assert function(data, tmp_path, **OPTIONS) == run
    stage, weights = (0, folder.model) if function is train_autoencoder else (1, folder.denoiser)
    assert digest(load_weights(weights)) == expected[stage]


def test_a_failed_resume_lets_go_of_the_folder(data, tmp_path):
    run = train_autoencoder(data, tmp_path, **OPTIONS)
    (run / "last.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last\.pth is no checkpoint") as kept:
        train_autoencoder(data, resume=run, device="cpu")
    with RunFolder(run) as folder:
        folder.lock()
    assert kept


def test_a_failure_while_drawing_leaves_nothing_behind(data, expected, tmp_path, monkeypatch):
    run = train_autoencoder(data, tmp_path, **OPTIONS)
    train_denoiser(data, tmp_path, **OPTIONS)
    model = SpikingDiffusion.load(run, device="cpu", precision="float32")
    images = model.sample(2)
    before = surroundings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.absorbing.codes_from_logits", fail)
        with pytest.raises(Fault):
            model.sample(2)
    assert surroundings() == before
    assert np.array_equal(model.sample(2), images)


# ---- stopping and resuming ----


def test_a_stopped_training_goes_on_from_python(data, expected, tmp_path, capsys):
    run = train_autoencoder(data, tmp_path, **OPTIONS, max_minutes=1e-6)
    assert capsys.readouterr().out.endswith(f"max_minutes 1e-06 reached: saved; resume with: resume={run}\n")
    with pytest.raises(UserError, match=rf"resume it with resume={run}, .*or choose another result_path"):
        train_autoencoder(data, tmp_path, **OPTIONS)
    assert train_autoencoder(data, resume=run, device="cpu") == run
    assert digest(load_weights(run / "model.pth")) == expected[0]


def test_a_signal_saves_and_says_how_to_go_on_from_python(data, tmp_path, monkeypatch):
    step = loop.Trainer._step

    def interrupted(trainer, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", interrupted)
    with pytest.raises(Interrupted, match=r"^terminated: saved; resume with: resume="):
        train_autoencoder(data, tmp_path, **OPTIONS)


def test_other_data_do_not_go_on(data, tmp_path):
    run = train_autoencoder(data, tmp_path, **OPTIONS, max_minutes=1e-6)
    other = image_data(data.train.flip(0), data.test)
    with pytest.raises(UserError, match=r"^data has different images from those of the run.*: pass those of the run$"):
        train_autoencoder(other, resume=run, device="cpu")


def test_config_says_of_the_data_only_what_is_true(data, tmp_path):
    config = json.loads((train_autoencoder(data, tmp_path, **OPTIONS) / "config.json").read_text())
    true = {"dataset_name": "ImageFolder", "held_out": 0, "train_images": 24, "image_size": 16, "channels": 1}
    assert config.items() >= true.items() and "data_path" not in config
    assert config["data"] == data.fingerprint and config["class_names"] == ["a", "b", "c"]


# ---- importing ----


def test_importing_it_loads_no_more_than_drawing_needs():
    heavy = ("pipeline.report", "pipeline.training.train", "pipeline.evaluation.evaluate", "tensorboard", "matplotlib")
    heavy += ("torch.utils.tensorboard", "sklearn", "torchmetrics", "jinja2", "pytorch_fid", "pandas", "tensorflow")
    show = (
        "import json, sys, torch, warnings, signal, random\n"
        "state = torch.get_rng_state(), random.getstate(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()\n"
        "handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
        "import spiking_diffusion\n"
        "now = torch.get_rng_state(), random.getstate(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()\n"
        "assert torch.equal(state[0], now[0]) and state[1:] == now[1:]\n"
        "assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(json.loads(done.stdout))
    assert "spiking_diffusion" in loaded and not loaded & set(heavy)
    ours = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in ROOT.rglob("*.py")}
    assert len(loaded & ours) < 65


def test_user_errors_are_value_errors():
    assert Exported is UserError and issubclass(UserError, ValueError)


def test_freed_memory_is_kept_as_on_the_command_line(monkeypatch):
    kept = []
    monkeypatch.setattr("pipeline.from_python.keep_freed_memory", lambda: kept.append(True))
    SpikingDiffusion.load(ROOT / "pretrained" / "fmnist", device="cpu")
    assert kept
