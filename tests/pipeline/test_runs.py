"""What a run leaves behind, that it can be stopped anywhere and repeated exactly, and what is read back from it."""

import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, LIVELY, SMALL, assert_same_run, read_images, read_log, read_metrics, write_bars, write_idx
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import load_dataset
from errors import UserError
from models import SDID, build_model
from pipeline.checkpoints import load_checkpoint, load_weights, save_weights
from pipeline.evaluation import image_records
from pipeline.evaluation.loaders import FeatureNetwork
from pipeline.evaluation.protocols import Metric
from pipeline.runtime import processes
from pipeline.training import loop as training
from pipeline.training import objectives as trainers

KINDS = ("", "_without_spikes")
WEIGHTS = ("model.pth", "diff_result/diff_model.pth")


# ---- a run from beginning to end ----


def test_a_run_leaves_everything(finished):
    run = finished.path
    log = read_log(run)
    assert [(line["stage"], line["epoch"]) for line in log] == [("vqsvae", 1), ("vqsvae", 2), ("sdid", 1), ("sdid", 2)]
    assert log[0].keys() == {"stage", "epoch", "loss", "mse", "quantizer_loss", "codebook_usage", "images"}
    images = read_images(run)
    assert images.shape == (5, 16, 16, 1) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 5, "if all were the same, comparing samples would prove nothing"
    for name in ("reconstructions", "samples"):
        previews = [f"{name}_epoch_{epoch:03}.png" for epoch in (1, 2)]
        assert sorted(path.name for path in (run / "samples").glob(f"{name}_*")) == previews
    first, second = (EventAccumulator(str(run / "tensorboard" / stage)).Reload() for stage in ("vqsvae", "sdid"))
    assert {"vqsvae/loss", "vqsvae/mse"} <= set(first.Tags()["scalars"])
    assert [events.Tags()["images"] for events in (first, second)] == [["reconstructions"], ["samples"]]
    assert [event.value for event in second.Scalars("sdid/loss")] == pytest.approx([line["loss"] for line in log[2:]])
    config = json.loads((run / "config.json").read_text())
    assert config["image_shape"] == [1, 16, 16] and config["epochs"] == 2 and config["versions"].keys() >= {"torch"}
    assert not list(run.rglob("*.part")) and not (run / "samples" / "png").exists()


def test_a_run_inside_its_image_folder(cli, tmp_path, monkeypatch):
    """What a run draws is no picture to train on: for its own next stage, after a stop, and for the next run."""
    write_bars(tmp_path / "pics", 24, 16, colour=False, seed=0)
    monkeypatch.chdir(tmp_path / "pics")
    run = Path("result", "ImageFolder", "snn-vq-vae")
    own = ("--dataset_name", "ImageFolder", "--data_path", ".", "--image_size", 16, *SMALL, *LIVELY)
    own += ("--epochs", 1, "--diffusion_epochs", 1)
    assert cli(*own, "--stage", "vqsvae").status == 0
    assert list(run.rglob("*.png")), "there is something to be mistaken for pictures"
    assert cli(*own, "--stage", "sdid", "--max_minutes", 1e-4).status == 0
    outcome = cli("--resume", run)
    assert outcome.status == 0 and "note: what a run has written to " in outcome.err and str(run) in outcome.err
    assert cli("--checkpoint", run, "--stage", "sample", "--png", "--result_path", ".").status == 0
    assert cli(*own, "--result_path", "again").status == 0
    first, second = (json.loads(path.read_text()) for path in sorted(Path().rglob("config.json")))
    assert first["data"] == second["data"] and first["data"]["train"]["count"] == 21


def test_weights_are_plain_state_dicts(finished):
    model = build_model("snn-vq-vae", channels=1, codebook_size=8, embedding_dim=8, spike_steps=4, hidden_channels=8)
    for network, name in ((model, WEIGHTS[0]), (SDID(8, 4, 4), WEIGHTS[1])):
        weights = torch.load(finished.path / name, weights_only=True)
        assert type(weights) is type(network.state_dict()) and weights.keys() == network.state_dict().keys()


def test_metrics_say_what_they_are(finished):
    records = read_metrics(finished.path)
    parts = [f"energy_{part}{kind}" for part in ("encode", "decode", "denoiser_pass", "sample") for kind in KINDS]
    parts += [f"energy_sample{kind}" for kind in ("_neurons", "_memory", "_memory_without_spikes")]
    assert records.keys() == {"mse", "ssim", "codebook_usage", "codebook_perplexity", "firing_rate", *parts}
    for record in records.values():
        assert record.keys() >= {"name", "value", "protocol", "split", "num_generated", "num_real", "seed"}
        assert (record["split"], record["seed"]) == ("test", 42)
        assert (record["num_real"], record["num_generated"]) in ((4, 0), (0, 4), (4, 4))
        assert record["protocol"] and isinstance(record["value"], float)


def test_a_run_ends_with_a_table_and_the_paths(finished):
    lines = finished.outcome.out.splitlines()
    for name, record in read_metrics(finished.path).items():
        assert sum(line.startswith(f"{name} ") and f"{record['value']:.4f}" in line for line in lines) == 1
    paths = [line.strip() for line in lines[lines.index(f"the run is in {finished.path}:") + 1 :]]
    names = (
        *WEIGHTS,
        "metrics.json",
        "report.html",
        "log.jsonl",
        *(f"samples/{s}" for s in ("grid.png", "trajectory.png", "images.npz")),
    )
    assert set(paths) == {str(finished.path / name) for name in names}
    few = "this needs at least 10000 generated images, not 5: give 10000 or more"
    assert f"no fid, clean_fid, kid, is, prdc: {few}" in lines
    assert finished.outcome.err == ""


def test_images_show_what_they_say(finished, grey):
    def image(name):
        return np.asarray(Image.open(finished.path / "samples" / name))

    def cells(pixels, rows, columns, size=16 * 3, gap=3):
        """The tiles of a grid, at the size of the images."""
        assert pixels.shape == (rows * (size + gap) + gap, columns * (size + gap) + gap, 3)
        starts = [(gap + i * (size + gap), gap + j * (size + gap)) for i in range(rows) for j in range(columns)]
        return [pixels[y : y + size : 3, x : x + size : 3] for y, x in starts]

    test = load_dataset("ImageFolder", grey[3], image_size=16).test
    originals = cells(image("reconstructions_epoch_002.png"), 2, 4)[:4]
    assert all(np.array_equal(tile[..., 0], image[0]) for tile, image in zip(originals, test, strict=True))
    images = read_images(finished.path)
    tiles = cells(image("grid.png"), 1, 5)
    assert all(np.array_equal(tile[..., :1], image) for tile, image in zip(tiles, images, strict=True))
    moments = image("trajectory.png").shape[1] // 51
    first, *_, last = cells(image("trajectory.png"), 2, moments)
    assert 2 < moments <= 12 and (first == 0).all() and np.array_equal(last[..., :1], images[0])
    assert len(cells(image("samples_epoch_001.png"), 2, 8)) == 16


def test_colour_and_another_size(cli, colour, tmp_path):
    arguments = (*colour, *SMALL, *LIVELY, "--epochs", 1, "--diffusion_epochs", 1, "--result_path", tmp_path, "--png")
    outcome = cli(*arguments)
    run = tmp_path / "ImageFolder" / "snn-vq-vae"
    assert (outcome.status, outcome.err) == (0, "")
    images = read_images(run)
    assert images.shape == (5, 20, 20, 3)
    singles = sorted((run / "samples" / "png").iterdir())
    assert len(singles) == 5
    assert all(np.array_equal(np.asarray(Image.open(path)), image) for path, image in zip(singles, images, strict=True))
    assert f"{run / 'samples' / 'png'}\n" in outcome.out and "00000.png" not in outcome.out
    (run / "samples" / "images.npz").unlink()
    assert cli("--resume", run, "--num_samples", 2).status == 0, "--png is remembered"
    assert len(list((run / "samples" / "png").iterdir())) == 2


@pytest.mark.parametrize("metrics", ["mse", "energy", "mse,ssim,codebook"])
def test_a_metric_that_needs_no_samples_leaves_them_alone(metrics, cli, run):
    cli("--checkpoint", run, "--stage", "sample", "--num_samples", 3, "--png")
    kept = {path: path.stat().st_mtime_ns for path in (run / "samples").rglob("*")}
    assert cli("--checkpoint", run, "--stage", "evaluate", "--metrics", metrics).status == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "samples").rglob("*")} == kept


def test_samples_are_used_again_if_they_were_drawn_alike(cli, run, monkeypatch):
    """And drawn anew with other settings, of other weights, or where there are too few or the file is damaged."""
    monkeypatch.setattr(image_records, "GENERATED_METRICS", {"is": Metric("none", 3, 0, lambda _: {"is": 0.0})})
    monkeypatch.setattr(
        image_records, "LOADERS", {"none": lambda *_: FeatureNetwork(torch.nn.Identity(), None, "none")}
    )
    evaluate = ("--checkpoint", run, "--metrics", "is", "--num_samples")
    archive = run / "samples" / "images.npz"

    def drawn(count, *options):
        before = archive.stat().st_mtime_ns
        assert cli(*evaluate, count, *options).status == 0
        return archive.stat().st_mtime_ns != before

    assert not drawn(3) and not drawn(5), "the training drew five"
    assert drawn(6) and not drawn(4)
    for other in (("--seed", 1), ("--temperature", 0.1), ("--sample_steps", 2), ("--reveal_order", "spread")):
        assert drawn(4, *other) and not drawn(4, *other)
    archive.write_bytes(archive.read_bytes()[:-200])
    assert drawn(4) and not drawn(4)
    weights = torch.load(run / "model.pth")
    weights["vq_layer.embeddings.weight"][0] += 1
    torch.save(weights, run / "model.pth")
    assert drawn(4) and not drawn(4)


def test_the_same_command_gives_the_same_run(cli, small, finished, tmp_path):
    assert cli(*small, "--result_path", tmp_path).status == 0
    assert_same_run(finished.path, tmp_path / "ImageFolder" / "snn-vq-vae")


def test_another_seed_gives_another_run(cli, small, finished, tmp_path):
    assert cli(*small, "--result_path", tmp_path, "--seed", 43, "--stage", "vqsvae").status == 0
    weights = load_weights(tmp_path / "ImageFolder" / "snn-vq-vae" / "model.pth")
    other = load_weights(finished.path / "model.pth")
    assert not torch.equal(weights["encoder.snn_convs.0.weight"], other["encoder.snn_convs.0.weight"])


# ---- stopping and going on ----


def test_stages_one_by_one(cli, small, finished, tmp_path):
    run = tmp_path / "ImageFolder" / "snn-vq-vae"
    place = (*small, "--result_path", tmp_path)
    assert cli(*place, "--stage", "vqsvae").status == 0 and not (run / WEIGHTS[1]).exists()
    assert cli(*place, "--stage", "sdid").status == 0 and not (run / "samples" / "images.npz").exists()
    assert cli(*place, "--stage", "sample").status == 0 and not (run / "metrics.json").exists()
    assert cli(*place, "--stage", "evaluate", "--num_samples", 5).status == 0
    assert_same_run(finished.path, run)


def test_one_epoch_and_one_more_is_two(cli, small, finished, tmp_path):
    run = tmp_path / "ImageFolder" / "snn-vq-vae"
    outcome = cli(*small, "--epochs", 1, "--stage", "vqsvae", "--result_path", tmp_path)
    assert outcome.status == 0
    for more in (("--epochs", 2, "--diffusion_epochs", 1, "--stage", "all"), ("--diffusion_epochs", 2)):
        outcome = cli("--resume", run, *more)
        assert (outcome.status, outcome.err) == (0, "")
    assert "stage 1 (" not in outcome.out
    assert_same_run(finished.path, run)


def test_stopped_by_the_clock_within_epochs(cli, small, finished, tmp_path, monkeypatch):
    minutes = iter(range(10**6))
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    limit = ("--max_minutes", 20)
    outcome = cli(*small, *limit, "--result_path", tmp_path)
    run, stops, steps = tmp_path / "ImageFolder" / "snn-vq-vae", 0, set()
    while "resume with: " in outcome.out:
        state = load_checkpoint(run / "last.pth")
        steps.add((state["stage"], state["epoch"], state["step"]))
        command = shlex.split(outcome.out.split("resume with: ")[1])
        assert command[:3] == ["python", "-u", "main.py"] and "the run is in" not in outcome.out
        outcome = cli(*command[3:], *limit)
        assert outcome.status == 0, outcome.err
        stops += 1
        assert stops < 20
    assert {stage for stage, _, step in steps if step} == {"vqsvae", "sdid"}, steps
    assert_same_run(finished.path, run)


@pytest.mark.parametrize("step", [20, 50, 80, 110])
def test_interrupted_anywhere(step, cli, small, finished, tmp_path, monkeypatch):
    steps, run = iter(range(1, 10**6)), tmp_path / "ImageFolder" / "snn-vq-vae"
    take = training.Trainer._step

    def interrupt(*arguments):
        if next(steps) == step:  # of 30 an epoch
            raise KeyboardInterrupt
        return take(*arguments)

    monkeypatch.setattr(training.Trainer, "_step", interrupt)
    outcome = cli(*small, "--result_path", tmp_path)
    assert outcome.status == 130 and outcome.err.startswith("interrupted: ") and outcome.err.count("\n") == 1
    again = cli(*small, "--result_path", tmp_path)
    if step == 20:  # nothing is lost yet: the same command begins again
        assert again.status == 0
    else:
        assert again.status == 2 and f"--resume {run}" in again.err and again.err.count("\n") == 1
        assert cli("--resume", run / "last.pth").status == 0
    assert_same_run(finished.path, run)


def test_resume_before_the_first_weights(cli, small, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*small, "--result_path", tmp_path).status == 130
    run = tmp_path / "ImageFolder" / "snn-vq-vae"
    assert cli("--resume", run).status == 0
    assert_same_run(finished.path, run)


def test_a_finished_run_resumes_to_its_evaluation(cli, finished, run):
    (run / "metrics.json").unlink()
    outcome = cli("--resume", run)
    assert outcome.status == 0 and " epoch " not in outcome.out
    assert_same_run(finished.path, run)


def test_diverged_training_stops(cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "to_float", lambda batch: batch * torch.nan)
    outcome = cli(*small, "--result_path", tmp_path)
    assert outcome.status == 2 and "step 1: loss is nan; nothing is saved yet" in outcome.err and "--lr" in outcome.err
    assert not (tmp_path / "ImageFolder" / "snn-vq-vae" / "model.pth").exists()


def test_a_file_is_whole_or_absent(run, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = (run / "model.pth").read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        save_weights(run / "model.pth", {})
    assert (run / "model.pth").read_bytes() == before


# ---- what is read back ----


def test_a_moved_checkpoint_knows_its_options(cli, finished, run, tmp_path, monkeypatch):
    shutil.rmtree(run / "samples")
    (run / "metrics.json").unlink()
    monkeypatch.chdir(tmp_path)
    outcome = cli("--checkpoint", "moved/run/model.pth", "--num_samples", 5)
    assert (outcome.status, outcome.err) == (0, "")
    assert_same_run(finished.path, run)
    assert "epoch" not in outcome.out


def test_options_of_the_command_line_win(cli, finished, run):
    outcome = cli("--checkpoint", run / "model.pth", "--num_samples", 7, "--seed", 1, "--stage", "sample")
    assert outcome.status == 0 and len(read_images(run)) == 7
    assert not np.array_equal(read_images(run)[:5], read_images(finished.path))


@pytest.mark.parametrize("options", [("--eval_batch_size", 1), ("--eval_batch_size", 3), ("--num_samples", 3)])
def test_a_sample_does_not_depend_on_the_others(options, cli, run, float64):
    sample = ("--checkpoint", run / "model.pth", "--stage", "sample")
    assert cli(*sample).status == 0
    together = read_images(run)
    assert cli(*sample, *options).status == 0
    images = read_images(run)
    assert np.array_equal(images, together[: len(images)])


def test_fewer_timesteps(cli, run):
    outcome = cli("--checkpoint", run / "model.pth", "--stage", "sample", "--sample_steps", 1)
    assert outcome.status == 0 and len(read_images(run)) == 64


def test_sampling_needs_no_data(cli, finished, run):
    arguments = ("--checkpoint", run / "model.pth", "--stage", "sample", "--data_path", "/nowhere", "--num_samples", 5)
    assert cli(*arguments).status == 0
    assert np.array_equal(read_images(run), read_images(finished.path))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_checkpoint_of_the_release(elsewhere, cli, tmp_path, monkeypatch, float64):
    """Bare state dicts, no config.json, batch norm without its counter; the folder may be of any name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "old" if elsewhere else tmp_path / "result" / "MNIST" / "snn-vq-vae"
    (folder / "diff_result").mkdir(parents=True)
    weights = {
        name.removeprefix("vqsvae.w."): torch.from_numpy(GOLDEN[name])
        for name in GOLDEN
        if name.startswith("vqsvae.w.")
    }
    assert not any("num_batches" in name for name in weights)
    torch.save(weights, folder / "model.pth")
    torch.manual_seed(0)
    denoiser = {name: value for name, value in SDID().state_dict().items() if "num_batches" not in name}
    torch.save(denoiser, folder / "diff_result" / "diff_model.pth")
    images = GOLDEN["image_u8"]
    for split in ("train", "t10k"):
        write_idx(tmp_path / "data" / "MNIST" / "raw", split, images[:, 0])
    other = tmp_path / "result" / "MNIST" / "snn-vq-vae" / "config.json"
    if elsewhere:  # another run's options are not taken for those of the release
        other.parent.mkdir(parents=True)
        other.write_text(json.dumps({"dataset_name": "MNIST", "spike_steps": 3}))

    arguments = ("--dataset_name", "MNIST", "--model", "snn-vq-vae", "--checkpoint", folder / "model.pth")
    sampled = ("--num_samples", 1, "--sample_steps", 1)
    machine = ("--precision", "float32", "--device", "cpu")
    for stage in ("sample", "evaluate"):
        own = ("--stage", stage, *(("--metrics", "mse") if stage == "evaluate" else ()))
        outcome = cli(*arguments, "--data_path", tmp_path / "data", *sampled, *machine, *own)
        assert (outcome.status, outcome.err) == (0, "")
    expected = np.round((GOLDEN["vqsvae.eval.recon"] + 0.5).clip(0, 1) * 255) / 255
    assert read_metrics(folder)["mse"]["value"] == pytest.approx(np.square(expected - images / 255).mean(), rel=1e-6)
    assert read_images(folder).shape == (1, 28, 28, 1) and not (folder / "config.json").exists()


# ---- the other models ----


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "vq-vae"),
        ("--model", "snn-vae"),
        ("--readout", "rate"),
        ("--spike_generator", "repeat"),
        ("--spike_generator", "poisson"),
    ],
)
def test_every_model_runs_resumes_and_is_read_back(options, cli, grey, tmp_path):
    own = () if "snn-vae" not in options else ("--codebook_size", "--denoiser_channels")
    keep = [i for i, word in enumerate(SMALL[::2]) if word not in own]
    small = (*grey, *(word for i in keep for word in SMALL[2 * i : 2 * i + 2]), *options, "--epochs", 2)
    second = () if "snn-vae" in options else ("--diffusion_epochs", 1)
    small = (*small, *(() if "--model" in options else LIVELY), *second, "--seed", 46)
    outcome = cli(*small, "--result_path", tmp_path / "whole")
    warnings = outcome.err.splitlines()
    assert outcome.status == 0 and all("the codebook is collapsing" in line for line in warnings), "it has eight codes"
    (whole,) = tmp_path.glob("whole/*/*")
    stopped = cli(*small, "--result_path", tmp_path / "parts", "--max_minutes", 1e-4)
    assert stopped.status == 0 and "saved" in stopped.out
    (parts,) = tmp_path.glob("parts/*/*")
    assert cli("--resume", parts, "--max_minutes", 60).status == 0
    log, records = read_log(whole), read_metrics(whole)
    losses = [line["loss"] for line in log]
    assert log[1]["mse"] < 0.8 * log[0]["mse"]
    assert [line["loss"] for line in read_log(parts)] == losses
    assert np.array_equal(read_images(whole), read_images(parts))
    assert {"mse", "ssim", "energy_encode", "energy_sample"} <= records.keys() and read_metrics(parts) == records
    (whole / "metrics.json").unlink()
    assert cli("--checkpoint", whole / "model.pth", "--num_samples", 5).status == 0 and read_metrics(whole) == records


def test_a_model_without_second_stage(cli, grey, tmp_path):
    arguments = (*grey, "--model", "snn-vae", "--result_path", tmp_path)
    outcome = cli(*arguments, "--stage", "sdid")
    assert outcome.status == 2 and "no second stage" in outcome.err and outcome.err.count("\n") == 1
    outcome = cli(*arguments, "--readout", "rate")
    assert outcome.status == 2 and "snn-vae has no --readout" in outcome.err


def test_nothing_is_shared_after_the_metrics_of_images(cli, run, monkeypatch):
    """Rank 0 alone computes these, for an hour maybe, and the other processes would give up on it."""
    calls, gather, compute = [], processes.gather, image_records.Evaluation.compute
    monkeypatch.setattr(processes, "gather", lambda parts: calls.append("gather") or gather(parts))
    monkeypatch.setattr(
        image_records.Evaluation, "compute", lambda *given, **more: calls.append("compute") or compute(*given, **more)
    )
    assert cli("--checkpoint", run, "--num_samples", 2).status == 0
    assert calls.count("compute") == 2 and calls.count("gather") > 3
    assert "gather" not in calls[calls.index("compute") :], "of reconstructions and of samples"
