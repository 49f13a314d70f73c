"""The improved preset, averaged weights, learning rates, filling in: what goes beyond the paper's method."""

import copy
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    IMPROVED,
    LIVELY,
    SMALL,
    assert_same_run,
    assert_same_weights,
    interrupt,
    read_log,
    read_metrics,
    run_in,
    without,
)
from PIL import Image
from torch import nn

from datasets import digest, load_dataset
from errors import UserError
from models.integer_layers import whole
from models.neurons import LIF
from models.spiking import fire
from parts import LR_SCHEDULES, MASKS
from pipeline.checkpoints import load_checkpoint, load_weights, save_weights
from pipeline.options.declaration import Role
from pipeline.options.presets import PRESETS
from pipeline.options.sections import with_role
from pipeline.resuming import read_last
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.sampling.masks import hidden_pixels, nearest_visible
from pipeline.training.averaging import moving_average
from pipeline.training.interruption import Interruption
from pipeline.training.loop import Place, Trainer
from pipeline.training.schedules import Schedule
from scripts import pack
from spiking_diffusion import SpikingDiffusion

TRAINED = without(IMPROVED, "--metrics")
"""Options of a training of one stage, after which nothing is evaluated."""


@pytest.fixture(scope="module")
def improved(cli, grey, tmp_path_factory):
    """A run of a small network with the preset, from beginning to end."""
    result = tmp_path_factory.mktemp("improved")
    outcome = cli(*grey, *IMPROVED, "--result_path", result)
    assert (outcome.status, outcome.err) == (0, "")
    return run_in(result)


def test_a_run_has_the_options_of_its_preset(improved):
    config = json.loads((improved / "config.json").read_text())
    own = {"hidden_channels": 8, "denoiser_channels": 48, "denoiser_blocks": 1, "batch_size": 8, "fixed_norm": 0.6}
    own |= {"epochs": 2, "diffusion_epochs": 2, "condition": "prototype"}
    assert {key: config[key] for key in PRESETS["improved"]} == PRESETS["improved"] | own
    assert config["preset"] == "improved" and config["codebook_size"] == 8


def test_stopped_and_resumed_is_the_same(improved, cli, grey, tmp_path):
    stopped = cli(*grey, *IMPROVED, "--result_path", tmp_path, "--max_minutes", 1e-4)
    run = run_in(tmp_path)
    while "saved" in stopped.out:
        stopped = cli("--resume", run, "--max_minutes", 0.005)
    assert stopped.status == 0
    assert_same_run(improved, run)


def test_evaluated_from_its_folder(improved, cli):
    """The folder stands for its model.pth; weights in half precision are read as well."""
    records = read_metrics(improved)
    (improved / "metrics.json").unlink()
    assert cli("--checkpoint", improved, *IMPROVED[-2:]).status == 0 and read_metrics(improved) == records


def test_a_packed_copy(improved, cli, tmp_path, capsys):
    """Weights that were trained rounded are kept in a byte each, with no loss; it draws from another place."""
    copy = tmp_path / "packed"
    pack.main([str(improved), str(copy)])
    assert "MiB of weights" in capsys.readouterr().out
    for name in ("model.pth", "diff_result/diff_model.pth"):
        before, after, stored = load_weights(improved / name), load_weights(copy / name), load_checkpoint(copy / name)
        assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
        large = {key for key, value in before.items() if value.is_floating_point() and value.dim() > 1}
        assert all(stored[key].dtype == torch.int8 for key in large)
        assert "prototypes.grids" not in stored or stored["prototypes.grids"].dtype == torch.uint8
        pack.main([str(improved), str(tmp_path / "again" / name), "--int8"])
        assert (tmp_path / "again" / name / name).read_bytes() == (copy / name).read_bytes()
    config = json.loads((copy / "config.json").read_text())
    assert (copy / "log.jsonl").read_text() == (improved / "log.jsonl").read_text()
    assert "data_path" not in config and config["denoiser"] == "unet" and config["image_shape"] == [1, 16, 16]
    outcome = cli("--checkpoint", copy, "--stage", "sample", "--num_samples", 3)
    assert (outcome.status, outcome.err) == (0, "") and (copy / "samples" / "grid.png").exists()


def test_packed_in_16_and_8_bits(run, cli, tmp_path):
    """The denoiser may have a byte for each weight and is off by half a step of its row at most; the rest has two."""
    run, small, half = RunFolder(run), RunFolder(tmp_path / "int8"), RunFolder(tmp_path / "half")
    pack.main([str(run.path), str(half.path)])
    pack.main([str(run.path), str(small.path), "--int8"])
    assert small.model.read_bytes() == half.model.read_bytes()
    own, halves = load_weights(run.denoiser), load_weights(half.denoiser)
    loaded, stored = load_weights(small.denoiser), load_checkpoint(small.denoiser)
    assert loaded.keys() == own.keys() == halves.keys()
    large = {name for name, value in own.items() if value.is_floating_point() and value.dim() > 1}
    assert {name for name, value in stored.items() if value.dtype == torch.int8} == large
    for name in own:
        if name in large:
            error, steps = (loaded[name] - own[name]).flatten(1).abs(), own[name].flatten(1).abs().amax(1) / 127
            assert (error.amax(1) <= 0.501 * steps).all() and error.any()
            assert halves[name].dtype == torch.half and torch.equal(halves[name], own[name].half())
        else:
            assert torch.equal(loaded[name], own[name].to(loaded[name].dtype))
    assert cli("--checkpoint", small.path, "--stage", "sample", "--num_samples", 3).status == 0


def test_what_is_no_run_is_not_packed(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        pack.main([str(tmp_path), str(tmp_path / "packed")])
    assert exit_.value.code == 2 and "no config.json" in capsys.readouterr().err


def test_a_temperature_that_was_chosen_is_packed(improved, tmp_path):
    """As a number: the copy has neither the held-out images nor the file with all distances."""
    run = RunFolder(shutil.copytree(improved, tmp_path / "run"))
    chosen = {"temperature": 0.7, "depends_on": {"weights": digest(*map(load_weights, (run.model, run.denoiser)))}}
    run.config.write_text(json.dumps(json.loads(run.config.read_text()) | {"temperature": "auto"}))
    (run.path / "temperature.json").write_text(json.dumps(chosen))
    assert SpikingDiffusion.load(run.path).model.settings.temperature == 0.7
    pack.pack(run, RunFolder(tmp_path / "packed"))
    settings = SpikingDiffusion.load(tmp_path / "packed").model.settings
    assert (settings.temperature, settings.final_temperature) == (0.7, None)
    for missing in (chosen | {"depends_on": {"weights": "others"}}, {"temperature": 0.7}, {}):
        (run.path / "temperature.json").write_text(json.dumps(missing))
        for use in (SpikingDiffusion.load, lambda path: pack.pack(RunFolder(path), RunFolder(tmp_path / "again"))):
            with pytest.raises(UserError, match="no temperature has been chosen"):
                use(run.path)
    assert not (tmp_path / "again").exists()


def test_packing_overwrites_nothing(improved, capsys):
    before = (improved / "model.pth").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        pack.main([str(improved), str(improved)])
    assert exit_.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert (improved / "model.pth").read_bytes() == before


def test_an_unfinished_run_leaves_no_half_of_a_copy(improved, tmp_path, capsys):
    shutil.copytree(improved, tmp_path / "run")
    RunFolder(tmp_path / "run").denoiser.unlink()
    with pytest.raises(SystemExit) as exit_:
        pack.main([str(tmp_path / "run"), str(tmp_path / "packed")])
    assert exit_.value.code == 2 and "diff_model.pth" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--preset", "better"), "faithful"),
        (("--preset", "improved", "--model", "vq-vae"), "is for snn-vq-vae"),
        (("--model", "vq-vae", "--downsampling", 2), "vq-vae has no --downsampling"),
        (("--denoiser", "residual", "--denoiser_channels", 24), "--denoiser_channels must be a multiple of 16, got 24"),
        (("--preset", "improved", "--images_per_prototype", 121), "too few training images (120)"),
        (("--preset", "improved", "--sample_steps", 257), "have 256 timesteps: use --sample_steps 256 instead of 257"),
        (("--images_per_prototype", 5), "sdid has no --images_per_prototype"),
        (("--preset", "improved", "--denoiser", "sdid"), "is for residual and unet: sdid has no --condition"),
        (("--model", "snn-vae", "--sort_codes"), "snn-vae has no --sort_codes"),
        (("--stage", "all", "--mask", "top"), "--mask has no effect in --stage all, only in --stage inpaint"),
    ],
)
def test_mistakes(options, expected, cli, grey, tmp_path):
    outcome = cli(*grey, *options, "--epochs", 1, "--spike_steps", 1, "--result_path", tmp_path)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and expected in outcome.err


def test_a_switch_of_the_preset_can_be_switched_off(cli, grey, tmp_path):
    outcome = cli(*grey, *TRAINED, "--no-clipped_error", "--stage", "vqsvae", "--result_path", tmp_path)
    assert outcome.status == 0
    config = json.loads((run_in(tmp_path) / "config.json").read_text())
    assert config["clipped_error"] is False and config["code_noise"] == PRESETS["improved"]["code_noise"]


def test_sorted_codes_are_a_renumbering(cli, grey, tmp_path):
    """Stage 1 ends as without it but for the order of the codes; a denoiser that knows another order is refused."""
    runs = []
    for name, options in {"sorted": ("--sort_codes",), "plain": ()}.items():
        brief = ("--stage", "vqsvae", "--epochs", 1, "--result_path", tmp_path / name)
        assert cli(*grey, *SMALL, *LIVELY, *brief, *options).status == 0
        runs.append(load_weights(run_in(tmp_path / name) / "model.pth"))
    after, before = (weights["vq_layer.embeddings.weight"] for weights in runs)
    assert not torch.equal(after, before) and sorted(after.tolist()) == sorted(before.tolist())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0] if "embeddings" not in key)
    stage_2 = ("--stage", "sdid", "--diffusion_epochs", 1, "--result_path", tmp_path / "plain")
    assert cli(*grey, *SMALL, *stage_2).status == 0
    begin = ("--start_from", run_in(tmp_path / "plain"), "--sort_codes", "--result_path", tmp_path / "again")
    renumbered = cli(*grey, *SMALL, *begin)
    assert renumbered.status == 2 and "add --new_denoiser" in renumbered.err


# ---- beginning with a run's networks ----


def test_denoiser_trained_on(improved, cli, grey, tmp_path):
    """A learning rate of nearly nothing leaves the weights as they were; the run has all it needs to be evaluated."""
    still = ("--diffusion_lr", 1e-9, "--ema_decay", 0, "--diffusion_epochs", 1, "--precision", "float32")
    outcome = cli(*grey, "--start_from", improved, "--stage", "sdid", *still, "--result_path", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    run = run_in(tmp_path)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (run, improved))
    networks = with_role(Role.NETWORKS)
    assert {key: config[key] for key in networks} == {key: before[key] for key in networks}
    for name in ("model.pth", "diff_result/diff_model.pth"):
        old, new = load_weights(improved / name), load_weights(run / name)
        weights = [key for key in old if "running" not in key and "num_batches" not in key]
        assert weights and not [key for key in weights if not torch.allclose(old[key], new[key], atol=1e-6)]
    assert cli("--checkpoint", run, "--num_samples", 2, "--metrics", "mse").status == 0


@pytest.mark.parametrize("saved", [True, False])
def test_denoiser_trained_on_is_resumed(saved, improved, cli, grey, tmp_path, monkeypatch):
    """It trains stage 2, as it was told, whatever the call is; and once something is saved, without the other run."""
    start, result = shutil.copytree(improved, tmp_path / "start"), tmp_path / "result"
    begin = (*grey, "--start_from", start, "--stage", "sdid", "--diffusion_epochs", 1, "--precision", "float32")
    if saved:
        begun = cli(*begin, "--max_minutes", 1e-4, "--result_path", result)
        assert begun.status == 0 and "saved; resume with" in begun.out
        shutil.move(start, tmp_path / "moved")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "__enter__", interrupt)
            assert cli(*begin, "--result_path", result).status == 130
    run = run_in(result)
    outcome = cli("--resume", run, *(() if saved else ("--stage", "all", "--num_samples", 2, "--metrics", "mse")))
    assert (outcome.status, outcome.err) == (0, "") and (run / "metrics.json").exists() == (not saved)
    if saved:
        shutil.move(tmp_path / "moved", start)
    assert cli(*begin, "--result_path", tmp_path / "whole").status == 0
    whole = run_in(tmp_path / "whole")
    assert read_log(whole) == read_log(run) and [line["stage"] for line in read_log(run)] == ["sdid"]
    for name in ("model.pth", "diff_result/diff_model.pth"):
        one, other = load_weights(whole / name), load_weights(run / name)
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_new_denoiser_on_trained_codes(improved, cli, grey, tmp_path):
    """A run of stage 1 alone has none to begin with; to train stage 1 on, what its denoiser is like does not matter."""
    start = tmp_path / "start"
    shutil.copytree(improved, start, ignore=shutil.ignore_patterns("diff_result"))
    new = (*grey, "--denoiser_channels", 96, "--diffusion_epochs", 1)
    outcome = cli(*new, "--start_from", start, "--stage", "sdid", "--result_path", tmp_path / "new")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.count(f"{start} has no denoiser: the new one is trained from scratch\n") == 1
    outcome = cli(
        *new, "--start_from", improved, "--stage", "sdid", "--new_denoiser", "--result_path", tmp_path / "same"
    )
    assert (outcome.status, outcome.err) == (0, "") and "no denoiser" not in outcome.out
    assert_same_weights(run_in(tmp_path / "new"), run_in(tmp_path / "same"))
    result = ("--result_path", tmp_path / "stage_1")
    assert cli(*new, "--epochs", 1, "--start_from", improved, "--stage", "vqsvae", *result).status == 0
    outcome = cli(*new, "--model", "residual-svae", "--stage", "sdid", *result)
    assert (outcome.status, outcome.err) == (0, "") and "untrained" not in outcome.out


def test_new_denoiser_is_resumed_without_the_other_run(improved, cli, grey, tmp_path):
    """Even if it was stopped before anything of stage 2 was saved."""
    start = shutil.copytree(improved, tmp_path / "start")
    begin = (*grey, "--start_from", start, "--stage", "sdid", "--new_denoiser", "--denoiser_channels", 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interruption, "__enter__", interrupt)
        assert cli(*begin, "--diffusion_epochs", 1, "--result_path", tmp_path).status == 130
    shutil.rmtree(start)
    outcome = cli("--resume", run_in(tmp_path))
    assert (outcome.status, outcome.err) == (0, "")
    assert "--new_denoiser is for --start_from" in cli(*grey, "--new_denoiser", "--result_path", tmp_path / "new").err


def test_a_denoiser_without_margin_is_trained_further_but_not_resumed(improved, cli, grey, tmp_path):
    start = shutil.copytree(improved, tmp_path / "start")
    older = load_weights(start / "diff_result" / "diff_model.pth")
    older["embed.weight"] = older["embed.weight"][..., 1:-1, 1:-1].clone()
    save_weights(start / "diff_result" / "diff_model.pth", older)
    begin = (*grey, "--start_from", start, "--stage", "sdid", "--diffusion_epochs", 1, "--max_minutes", 1e-4)
    assert cli(*begin, "--result_path", tmp_path).status == 0
    last = run_in(tmp_path) / "last.pth"
    state = load_checkpoint(last)
    save_weights(last, {**state, "model": older})
    outcome = cli("--resume", run_in(tmp_path))
    assert outcome.status == 2 and f"{last} does not fit" in outcome.err and "resume with git commit" in outcome.err


def test_start_that_is_gone(improved, cli, grey, tmp_path):
    """Stage 2 will need it, which is said before stage 1 goes on."""
    start = shutil.copytree(improved, tmp_path / "start")
    assert cli(*grey, "--start_from", start, "--max_minutes", 1e-4, "--result_path", tmp_path).status == 0
    shutil.rmtree(start)
    run = run_in(tmp_path)
    before = (run / "last.pth").read_bytes()
    outcome = cli("--resume", run)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"{start}, which stage 2 is to begin with, is missing" in outcome.err
    assert (run / "last.pth").read_bytes() == before


def test_both_networks_trained_on(improved, cli, grey, tmp_path):
    still = ("--lr", 1e-9, "--diffusion_lr", 1e-9, "--ema_decay", 0, "--epochs", 1, "--diffusion_epochs", 1)
    still = (*still, "--no-revive_codes", "--num_samples", 2, "--metrics", "mse")
    assert cli(*grey, "--start_from", improved, *still, "--result_path", tmp_path).status == 0
    for name in ("model.pth", "diff_result/diff_model.pth"):
        old, new = (load_weights(run / name) for run in (improved, run_in(tmp_path)))
        assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old if key.endswith("weight"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--denoiser_channels", 96), "a different network"),
        (("--stage", "sdid", "--codebook_size", 9), "other options: omit --codebook_size (8 in the run)"),
        (("--stage", "sdid", "--spike_steps", 2), "other options: omit --spike_steps (1 in the run)"),
        (("--stage", "sdid", "--digits", 3), "other options: omit --digits (4 in the run)"),
        (("--stage", "sdid", "--downsampling", 4), "other options: omit --downsampling (2 in the run)"),
        (("--stage", "sdid", "--spike_generator", "repeat"), "omit --spike_generator (adaptive in the run)"),
        (("--stage", "sdid", "--neuron", "if"), "other options: omit --neuron (fs in the run)"),
        (("--stage", "sdid", "--denoiser_channels", 96), "a different network"),
        (("--resume", "there"), "begins a new run"),
    ],
)
def test_mistakes_at_the_beginning(options, expected, improved, cli, grey, tmp_path):
    outcome = cli(*grey, "--start_from", improved, *options, "--result_path", tmp_path)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and expected in outcome.err
    assert cli(*grey, "--start_from", tmp_path).err.count("is not a run folder") == 1


# ---- learning rate and averaged weights ----


def test_learning_rates():
    assert {LR_SCHEDULES["constant"](done) for done in (0, 0.3, 1)} == {1}
    cosine = LR_SCHEDULES["cosine"]
    assert cosine(0) == 0 and cosine(0.5) == pytest.approx(0.5) and cosine(1) == pytest.approx(0)
    assert cosine(0.01) == pytest.approx(0.5, rel=1e-3) and cosine(0.02) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_step_learns(schedule, tmp_path, monkeypatch):
    """The cosine begins and ends at 0, no step does: each has the factor of its middle."""
    rates, take = [], Trainer._step

    def step(trainer, *batch):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return take(trainer, *batch)

    monkeypatch.setattr(Trainer, "_step", step)
    trained_layer(tmp_path, epochs=5, lr_schedule=schedule)
    assert min(rates) > 0
    assert rates == pytest.approx([0.1 * LR_SCHEDULES[schedule]((step + 0.5) / 100) for step in range(100)])


def test_moving_average_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    average, expected = moving_average(layer, 0.5), None
    for step, value in enumerate([4.0, 8.0, -2.0, 6.0, 1.0, 1.0, 9.0, 3.0, 5.0, 7.0, 2.0, 8.0]):
        layer.weight.data.fill_(value)
        average.update_parameters(layer)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)


def trained_layer(folder, see=lambda model: None, **schedule):
    """A linear layer with batch norm, trained in 20 steps an epoch; `see` is given it in each. Returns its Trainer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4))

    def losses(network, generator, batch):
        out = network(batch)
        if network is model and torch.is_grad_enabled():
            see(model)
        return {"loss": (out - 5).square().mean()}

    with RunFolder(folder) as run:
        trainer = Trainer(
            *((1, "test"), model, (torch.randn(200, 1, 3) * 3 + 1,), losses, lambda network, epoch: {}),
            Place(run, Schedule(batch_size=10, lr=0.1, seed=0, **schedule), Machine(torch.device("cpu"), bf16=False)),
            folder / "kept.pth",
        )
        assert trainer.train()
    return trainer


def test_kept_statistics_are_those_of_the_averaged_weights(tmp_path):
    """Batch norm of the kept network normalises its own input; the trained network's statistics are left alone."""
    trainer = trained_layer(tmp_path, epochs=1, ema_decay=0.9)
    model, kept = trainer.model, trainer.kept
    assert not torch.equal(kept[1].weight, model[1].weight)
    out = kept.eval()[1](trainer.examples[:][0].flatten(1))
    torch.testing.assert_close(kept[2].running_mean, out.mean(0))
    torch.testing.assert_close(kept[2].running_var, out.var(0), rtol=0.1, atol=0)
    assert kept[2].momentum == 0.1 and not torch.allclose(model[2].running_mean, kept[2].running_mean, rtol=1e-3)
    assert torch.equal(load_weights(tmp_path / "kept.pth")["2.running_mean"], kept[2].running_mean)


def test_saves_within_an_epoch_take_no_statistics(tmp_path):
    """They would cost minutes of every ten: a save within an epoch writes only what is needed to go on."""

    def watched(name):
        return mock.patch.object(Trainer, name, autospec=True, side_effect=getattr(Trainer, name))

    with watched("_calibrate_average") as statistics, watched("_save_state") as saves:
        trained_layer(tmp_path, epochs=3, ema_decay=0.9, save_every=1e-9)
    assert (statistics.call_count, saves.call_count) == (3, 60)


def test_stopped_and_ended_at_once(tmp_path):
    """Told to train no further, a run that stopped within an epoch keeps weights with statistics of their own."""
    first = trained_layer(tmp_path, epochs=1, ema_decay=0.9)
    first.progress.step = 7
    first.save()
    kept = load_weights(tmp_path / "kept.pth")
    (tmp_path / "kept.pth").unlink()
    first.average.module[2].reset_running_stats()
    last = read_last(RunFolder(tmp_path))
    last["average"]["module.2.running_mean"].zero_()  # as they are written before statistics are taken
    first.restore(last)
    again = load_weights(tmp_path / "kept.pth")
    assert kept["2.running_mean"].abs().sum() > 0 and all(torch.equal(kept[key], again[key]) for key in kept)


def test_stopped_while_statistics_are_taken(improved, cli, grey, tmp_path, monkeypatch):
    """That takes a while in a large network; what is needed to go on has been written before."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_calibrate_average", interrupt)
        assert cli(*grey, *IMPROVED, "--result_path", tmp_path, "--save_every", 1e-9).status == 130
    run = run_in(tmp_path)
    assert (run / "last.pth").exists() and not (run / "model.pth").exists()
    again = cli(*grey, *IMPROVED, "--result_path", tmp_path)
    assert again.status == 2 and f"interrupted training: resume it with --resume {run}" in again.err
    assert cli("--resume", run).status == 0
    assert_same_run(improved, run)


def test_a_second_stage_that_was_stopped_early_is_not_begun_again(improved, cli, grey, tmp_path, monkeypatch):
    """The first stage's last.pth may be replaced by the second's, but not that of the second."""
    place = ("--result_path", tmp_path, "--save_every", 1e-9)
    assert cli(*grey, *TRAINED, *place, "--stage", "vqsvae").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_calibrate_average", interrupt)
        assert cli(*grey, *TRAINED, *place, "--stage", "sdid").status == 130
    again = cli(*grey, *TRAINED, *place, "--stage", "sdid")
    assert again.status == 2 and "interrupted training" in again.err
    assert cli("--resume", run_in(tmp_path)).status == 0
    assert_same_weights(improved, run_in(tmp_path))


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_fixed_statistics(tmp_path, ema_decay):
    """From the middle of the steps on they are those of the weights there, in training and in what is kept."""
    seen = []  # of each step: whether batch norm is in training mode, the layer before it, its mean afterwards

    def see(model):
        seen.append((model[2].training, copy.deepcopy(model[1]), model[2].running_mean.clone()))

    trainer = trained_layer(tmp_path, see, epochs=3, ema_decay=ema_decay, fixed_norm=0.5)
    assert [training for training, *_ in seen] == [True] * 30 + [False] * 30
    assert all(torch.equal(mean, seen[30][2]) for *_, mean in seen[30:])
    _, layer, mean = seen[30]
    torch.testing.assert_close(mean, layer(trainer.examples[:][0].flatten(1)).mean(0))
    assert not torch.equal(layer.weight, seen[-1][1].weight), "the weights are trained on"
    assert torch.equal(trainer.kept[2].running_mean, seen[30][2])


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_whole_weights(tmp_path, ema_decay):
    """The last half of the steps is made with rounded weights, but by way of the network's own; the result is whole."""
    seen = []

    def see(model):
        seen.append(model[1].weight.detach().clone())

    trainer = trained_layer(tmp_path, see, epochs=2, ema_decay=ema_decay, int8_weights=0.5)
    assert [torch.equal(whole(weight), weight) for weight in seen] == [False] * 20 + [True] * 20
    kept = load_weights(tmp_path / "kept.pth")["1.weight"]
    assert torch.equal(kept, trainer.kept[1].weight) and torch.equal(whole(kept), kept)
    if ema_decay:
        own = trainer.model[1].weight
        assert not torch.equal(whole(own), own), "small steps add up"


@pytest.mark.parametrize("constant", [True, False])
def test_cumulative_batch_norm_statistics(constant):
    """With momentum None the running statistics are means over all batches, in the fast kernels as in torch."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4, momentum=None) for _ in range(2)]
    for size in (1, 2, 3):
        x = (torch.randn(6, 4, 5, 5) * size + size).contiguous(memory_format=torch.channels_last)
        steps = x.repeat(2, 1, 1, 1) if constant else x
        norms[0](steps)
        fire(norms[1], LIF(), x, 2, bias=torch.zeros(4), constant=constant)
    for name, value in norms[0].state_dict().items():
        torch.testing.assert_close(norms[1].state_dict()[name], value)


# ---- filling in ----


def test_masks_by_name():
    assert hidden_pixels("left", 4, 6)[:, :3].all() and not hidden_pixels("left", 4, 6)[:, 3:].any()
    assert hidden_pixels("bottom", 4, 6)[2:].all() and not hidden_pixels("bottom", 4, 6)[:2].any()
    assert hidden_pixels("center", 8, 8)[2:6, 2:6].all() and hidden_pixels("center", 8, 8).sum() == 16
    for one, other in (("left", "right"), ("top", "bottom")):
        assert torch.equal(hidden_pixels(one, 6, 8), ~hidden_pixels(other, 6, 8))
    assert all(hidden_pixels(name, 7, 5).shape == (7, 5) for name in MASKS)


def test_filling_in_keeps_the_rest(improved, cli, tmp_path):
    """Rows: the image, what is seen, fillings; what is not hidden is the image's own, and fillings differ."""
    mask = np.zeros((16, 16), np.uint8)
    mask[:6, :9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    outcome = cli("--checkpoint", improved, "--stage", "inpaint", "--mask", tmp_path / "mask.png", "--num_samples", 3)
    assert (outcome.status, outcome.err) == (0, "") and "inpainted.png" in outcome.out
    image = np.array(Image.open(improved / "samples" / "inpainted.png"))[:, :, 0]
    tiles = [[image[3 + 51 * y :: 3, 3 + 51 * x :: 3][:16, :16] for x in range(3)] for y in range(6)]
    original, seen, *fillings = np.array(tiles)
    assert (seen[:, mask > 0] == 128).all() and (seen[:, mask == 0] == original[:, mask == 0]).all()
    assert all((filling[:, mask == 0] == original[:, mask == 0]).all() for filling in fillings)
    assert any((fillings[0] != filling).any() for filling in fillings[1:])


def test_what_is_seen_is_given_and_nothing_leaks(improved, grey, monkeypatch):
    """Cells without a hidden pixel keep their codes; what was hidden has no influence, and what is drawn fits in."""
    model = SpikingDiffusion.load(improved, device="cpu", precision="float32").model
    images, hidden = load_dataset("ImageFolder", grey[3], image_size=16).test, torch.zeros(16, 16, dtype=torch.bool)
    hidden[5:16, 7:14] = True  # ends within a cell
    given, draw = [], CodeDiffusion._draw_codes
    monkeypatch.setattr(CodeDiffusion, "_draw_codes", lambda self, *inputs: given.append(inputs) or draw(self, *inputs))
    completed = model.inpaint(images, hidden)
    tokens, mask = given[0][1], model.diffusion.mask_token
    covered = np.array([[hidden[y : y + 2, x : x + 2].any() for x in range(0, 16, 2)] for y in range(0, 16, 2)])
    covered = np.kron(covered, np.ones((2, 2), bool))  # a position, of 2x2 pixels, has 2x2 codes
    assert ((tokens == mask).numpy() == covered).all() and 0 < covered.sum() < covered.size
    codes = model.encode(images)
    assert (tokens == codes)[:, :, :2].all(), "far from what is hidden they are those of the image"
    assert torch.equal(completed[..., ~hidden], images[..., ~hidden])
    others = torch.where(hidden, 255 - images, images)
    assert torch.equal(model.inpaint(others, hidden), completed)
    drawn = torch.where(hidden, model._decode(draw(model, range(len(images)), tokens)[0]), images)
    assert torch.equal(completed, torch.where(hidden, model.reconstruct(drawn), images))
    assert torch.equal(model.inpaint(images, torch.zeros_like(hidden)), images)
    everything = torch.ones_like(hidden)
    assert torch.equal(model.inpaint(images, everything), model.inpaint(others, everything))


def test_nearest_visible_pixels():
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 2:] = True
    rows, columns = nearest_visible(hidden)
    assert (rows == torch.arange(3)[:, None]).all() and (columns == torch.tensor([0, 1, 1, 1, 1])).all()


def test_mistakes_with_masks(improved, cli, tmp_path, grey):
    Image.new("L", (5, 5), 255).save(tmp_path / "small.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    Image.fromarray(np.full((16, 16), 1, np.uint8)).save(tmp_path / "one.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 255)).save(tmp_path / "brush.png")
    cases = {
        "middle": "left, right",
        "small.png": "16x16",
        "black.png": "no white pixel",
        "one.png": "the brightest has 1 of 255",
        "brush.png": "transparent ones 0",
        "white.png": "all white: paint black, or leave transparent, what is to be kept",
        "text.png": "not one of PNG",
    }
    for name, expected in cases.items():
        mask = tmp_path / name if "." in name else name
        outcome = cli("--checkpoint", improved, "--stage", "inpaint", "--mask", mask)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1) and expected in outcome.err
    outcome = cli(*grey, "--model", "snn-vae", "--stage", "inpaint", "--result_path", tmp_path)
    assert outcome.status == 2 and "has no codes" in outcome.err
