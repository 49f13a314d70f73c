"""What a call says before it begins, and how long it says a stage will take."""

import re

import pytest
import torch
from helpers import IMPROVED, SMALL, run_in, without

from models import build_denoiser
from parts import AUTOENCODERS, DENOISERS
from pipeline import start
from pipeline.checkpoints import load_weights
from pipeline.training import loop
from progress import Pace


def block(out):
    """The first lines that are indented by two, by name; a line without one continues the one before."""
    rows, name = {}, None
    for line in out.splitlines():
        if not line.startswith("  "):
            break
        name = line[2:10].strip() or name
        rows[name] = " ".join(filter(None, (rows.get(name), line[12:])))
    return rows


def parameters(path):
    """Of a network, but for buffers: batch norm's statistics, and what conditions were fitted to."""
    names = ("running_mean", "running_var", "num_batches_tracked", "counts", "prototypes.codes")
    return sum(weight.numel() for name, weight in load_weights(path).items() if not name.endswith(names))


def test_a_training_says_what_it_will_do(finished, small):
    rows = block(finished.outcome.out)
    assert list(rows) == ["data set", "preset", "stage 1", "stage 2", "neuron", "device", "seed", "folder", "warning"]
    assert finished.outcome.out.index("  folder") < finished.outcome.out.index("stage 1 (vqsvae)")
    counts = "120 training, 0 held-out and 4 test images, 16x16 pixels, grey"
    assert rows["data set"] == f"ImageFolder in {small[small.index('--data_path') + 1]}: {counts}"
    trained = "2 epochs x 30 steps, batch size 4: 60 steps, 240 images"
    for stage, (name, file) in {1: ("snn-vq-vae", "model.pth"), 2: ("sdid", "diff_result/diff_model.pth")}.items():
        size = f"{parameters(finished.path / file):,} parameters"
        assert rows[f"stage {stage}"] == f"{name}, {size}, 4 spike steps {trained}"
    assert re.fullmatch(r"cpu, .+; float32, 1 thread", rows["device"]) and rows["seed"] == "42"
    assert rows["folder"] == str(finished.path) and rows["preset"] == "faithful"
    assert len(finished.outcome.out.split("stage 1 (vqsvae)")[0].splitlines()) <= 12


@pytest.mark.parametrize("model", AUTOENCODERS)
def test_every_network_is_counted_without_memory(model, cli, grey, tmp_path):
    stages = ("--stage", "vqsvae") if model == "snn-vae" else ()
    options = (*grey, "--model", model, "--epochs", 10**6, *stages, "--max_minutes", 1e-9, "--result_path", tmp_path)
    rows = block(cli(*options, "--device", "cpu").out)
    size = f"{parameters(run_in(tmp_path, model) / 'model.pth'):,} parameters"
    assert size in rows["stage 1"] and ("spike steps" in rows["stage 1"]) == (model != "vq-vae")
    assert ("stage 2" in rows) == (model != "snn-vae")


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_can_be_counted(name):
    with torch.device("meta"):
        described = start.describe_network(name, build_denoiser(name))
    size = sum(parameter.numel() for parameter in build_denoiser(name).parameters())
    assert described.startswith(f"{name}, {size:,} parameters, ")


def test_announcing_changes_no_weights(cli, grey, tmp_path, monkeypatch):
    options = (*grey, *without(IMPROVED, "--metrics"), "--stage", "vqsvae", "--result_path")
    assert cli(*options, tmp_path / "with").status == 0
    monkeypatch.setattr("pipeline.stages.announce_training", lambda session: None)
    outcome = cli(*options, tmp_path / "without")
    assert outcome.status == 0 and block(outcome.out) == {}
    one, other = (load_weights(run_in(tmp_path / name) / "model.pth") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("stage", "epochs", "advice"),
    [
        ("all", (1, 2), "--epochs 34 --diffusion_epochs 67"),
        ("vqsvae", (1, 2), "--epochs 34"),
        ("all", (7, 2), "--diffusion_epochs 67"),
        ("all", (6, 14), "--epochs 34"),
        ("all", (7, 14), None),
    ],
)
def test_few_steps_are_warned_about(stage, epochs, advice, cli, grey, tmp_path):
    """Of 30 steps an epoch: 200 are not few in stage 1, and 400 in stage 2. As many as are advised are enough."""
    lengths = ("--stage", stage, "--epochs", epochs[0], "--diffusion_epochs", epochs[1])
    rows = block(cli(*grey, *SMALL, *lengths, "--max_minutes", 1e-9, "--result_path", tmp_path).out)
    if advice is None:
        assert "warning" not in rows
    else:
        assert rows["warning"].endswith(f"better ones: {advice}")
    if stage == "vqsvae":
        assert "stage 2" not in rows


def test_what_is_advised_is_round_and_enough():
    for number in (0.2, 1, 9.01, 10, 14.3, 99.5, 101, 333.4, 12345):
        rounded = start._rounded_up(number)
        assert rounded >= number and rounded <= max(1.1 * number, number + 1)
        assert len(str(rounded).rstrip("0")) <= 2 and isinstance(rounded, int)


def test_a_resumed_training_says_where_it_goes_on(cli, small, tmp_path):
    first = cli(*small, "--result_path", tmp_path, "--max_minutes", 1e-9)
    rows = block(cli("--resume", run_in(tmp_path), "--max_minutes", 1e-9).out)
    assert rows["resumed"] == "vqsvae, 0 epochs and 1 steps done"
    assert "warning" not in rows and "warning" in block(first.out)
    assert cli("--resume", run_in(tmp_path)).status == 0
    rows = block(cli("--resume", run_in(tmp_path), "--diffusion_epochs", 3, "--max_minutes", 1e-9).out)
    assert rows["stage 1"].endswith("not trained in this call") and rows["stage 2"].endswith("90 steps, 360 images")
    assert rows["resumed"] == "sdid, 2 epochs and 0 steps done"


def test_stage_2_alone_says_that_stage_1_is_there(cli, small, run):
    (run / "diff_result" / "diff_model.pth").unlink()
    (run / "last.pth").unlink()
    result = run.parent / "result"
    run_in(result).parent.mkdir(parents=True)
    run.rename(run_in(result))
    rows = block(cli(*small, "--stage", "sdid", "--max_minutes", 1e-9, "--result_path", result).out)
    assert rows["stage 1"].endswith("not trained in this call") and "60 steps" in rows["stage 2"]


def test_sampling_and_evaluation_say_what_they_use(cli, run):
    sampled = block(cli("--checkpoint", run, "--stage", "sample", "--num_samples", 3).out)
    names = ["weights", "stage 1", "stage 2", "neuron", "data set", "images", "device", "seed", "folder"]
    assert list(sampled) == names and sampled["neuron"] == "lif, tau 2, v_threshold 1, v_reset 0 (compiled kernels)"
    assert sampled["weights"] == str(run / "model.pth") and sampled["folder"] == str(run)
    assert sampled["images"] == "3: temperature 0.65, all timesteps" and sampled["data set"] == "ImageFolder"
    evaluated = block(cli("--checkpoint", run, "--metrics", "mse").out)
    assert "120 training" in evaluated["data set"] and "images" not in evaluated and "stage 2" not in evaluated
    filled = block(cli("--checkpoint", run, "--stage", "inpaint", "--num_samples", 2).out)
    assert filled["images"] == "2, each completed 4 times: temperature 0.65, all timesteps"


def test_the_evaluation_after_a_training_says_nothing_new(finished):
    assert finished.outcome.out.count("  data set  ") == 1


# ---- how long it takes ----


def test_each_stage_says_once_how_long_it_takes(finished):
    told = [line for line in finished.outcome.out.splitlines() if re.match(r"stage \d \(\w+\): about ", line)]
    assert [line.split(":")[0] for line in told] == ["stage 1 (vqsvae)", "stage 2 (sdid)"]
    assert all(re.search(r"about \d+ (s|min)$", line) for line in told)


def test_the_estimate_is_of_the_steps_that_are_left(cli, small, tmp_path, monkeypatch):
    """Each step takes a second of this clock, and what begins a call ten."""
    calls = []

    def seconds_left(pace, done, now):
        calls.append((pace.total, done))
        return left(pace, done, float(done))

    left = Pace.seconds_left
    monkeypatch.setattr(loop.Pace, "seconds_left", seconds_left)
    outcome = cli(*small, "--stage", "vqsvae", "--result_path", tmp_path)
    assert "stage 1 (vqsvae): about 49 s\n" in outcome.out  # known after 11 of 60 steps
    assert calls == [(60, step) for step in range(1, 61)]
    calls.clear()
    resumed = cli("--resume", run_in(tmp_path), "--stage", "vqsvae", "--epochs", 3)
    assert "stage 1 (vqsvae): about 19 s\n" in resumed.out and calls == [(90, step) for step in range(61, 91)]


def test_the_estimate_comes_where_an_epoch_is_shorter_than_the_time_between_checks(cli, small, tmp_path, monkeypatch):
    """As of a small set on a GPU, which is asked for the loss every 50 steps."""
    calls = []
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", {"cpu": 7})
    monkeypatch.setattr(loop.Pace, "seconds_left", lambda _, done, __: calls.append(done))
    lengths = ("--batch_size", 40, "--epochs", 6, "--stage", "vqsvae")
    assert cli(*small, *lengths, "--result_path", tmp_path).status == 0
    assert calls == [7, 14]  # of 6 epochs x 3 steps


def test_epochs_have_a_time_stamp(finished):
    epochs = [line for line in finished.outcome.out.splitlines() if " epoch " in line]
    assert len(epochs) == 4
    assert all(re.search(r" images/s, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", line) for line in epochs)
