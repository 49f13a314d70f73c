"""The command line as its users meet it: help, mistakes, and whole runs in a process of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LIVELY, PRECISION, ROOT, SMALL, of_network
from PIL import Image

from models import SDID, build_model
from parts import AUTOENCODERS, DENOISERS, NEURONS
from pipeline import program
from pipeline.options.configuration import resolve
from pipeline.options.parser import MOST_USED, TITLES, as_shown
from pipeline.options.presets import PRESETS
from pipeline.options.sections import CODES, DECLARATIONS, DEFAULTS, SECTIONS, STAGES
from pipeline.training import loop as training
from scripts import pack


def shell(*arguments, folder):
    """`python -u main.py` as a user runs it; neither stdout nor stderr is a terminal."""
    command = [sys.executable, "-u", ROOT / "main.py", *PRECISION, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def mistake(cli):
    """Arguments to the one line on stderr that a mistake leaves; nothing is printed besides what a call begins with."""

    def call(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = cli(*arguments)
        assert outcome.status == 2 and all(line.startswith("  ") for line in outcome.out.splitlines())
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and outcome.err.endswith("\n")
        return outcome.err

    return call


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- help and parsing ----


def test_help_tells_every_option_with_its_default(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    help_text = cli("--help").out
    titles = [MOST_USED, *(TITLES.get(name, name) for name in SECTIONS)]
    assert re.findall(r"^(\S.*):$", help_text, re.MULTILINE) == ["options", *titles]
    most_used = help_text.split(f"{MOST_USED}:")[1].split("\n\n")[0]
    assert len(re.findall(r"^  --", most_used, re.MULTILINE)) == 12
    assert max(map(len, help_text.splitlines())) <= 80
    for name, declared in DECLARATIONS.items():
        assert f"--{name}" in help_text and len(declared.help) > 5, name
        default = declared.shown or declared.absent or as_shown(DEFAULTS[name])
        assert f"[{default}]" in " ".join(help_text.split()), name


def test_choices_are_those_of_the_rooms_that_use_them():
    assert set(CODES) | {"snn-vae"} == set(AUTOENCODERS)
    owners = {owner for declared in DECLARATIONS.values() for owner in declared.of}
    assert owners <= {*AUTOENCODERS, *DENOISERS, *NEURONS}


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (("--stage", "sample", "--mask", "top"), "--mask has no effect in --stage sample, only in --stage inpaint"),
        (("--stage", "inpaint", "--png"), "no effect in --stage inpaint, only in --stage all or in --stage vqsvae or"),
        (
            ("--checkpoint", "pretrained/fmnist", "--labels", 3),
            "with --checkpoint, only in --stage sample or in --stage",
        ),
        (("--stage", "sample", "--start_from", "pretrained/fmnist"), "--start_from has no effect in --stage sample"),
        (("--stage", "sample", "--epochs", 5), "--epochs has no effect in --stage sample"),
        (("--stage", "evaluate", "--ema_decay", 0.5), "--ema_decay has no effect in --stage evaluate"),
        (("--stage", "sample", "--metrics", "fad"), "--metrics has no effect in --stage sample"),
        (("--stage", "vqsvae", "--metrics", "fad"), "--metrics has no effect in --stage vqsvae"),
        (("--stage", "sdid", "--epochs", 5), "--epochs has no effect in --stage sdid"),
        (("--checkpoint", "pretrained/fmnist", "--max_minutes", 5), "no effect with --checkpoint, only in a training:"),
        (("--checkpoint", "pretrained/fmnist", "--diffusion_epochs", 5), "--diffusion_epochs has no effect"),
    ],
)
def test_options_without_effect_in_a_stage(options, stages, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stages in mistake(*options, "--result_path", tmp_path)
    assert {stage for declared in DECLARATIONS.values() for stage in declared.stages} <= set(STAGES)


def test_options_without_effect_may_repeat_what_holds_anyway(cli, run, grey):
    """So the options of one call serve for the next stage, too."""
    assert cli("--checkpoint", run, "--epochs", 2, "--metrics", "mse").status == 0
    assert "--epochs has no effect" in cli("--checkpoint", run, "--epochs", 3, "--metrics", "mse").err


def test_a_condition_that_the_data_cannot_give_is_refused_before_stage_1(mistake, grey, tmp_path):
    options = ("--preset", "improved", "--condition", "both", "--images_per_prototype", 10, "--result_path", tmp_path)
    assert "has no labels" in mistake(*grey, *options, "--stage", "vqsvae")


@pytest.mark.parametrize("option", ["--epoch", "--data", "--nonsense", "--no-png"])
def test_unknown_and_shortened_options(option, mistake):
    assert option in mistake(option, "3")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--dataset_name", "MNSIT", "'MNIST'|MNIST,"),
        ("--model", "vqvae", "snn-vq-vae"),
        ("--stage", "train", "vqsvae"),
        ("--loss", "l2", "reweighted_elbo"),
        ("--precision", "fp16", "float32"),
        ("--metrics", "fid,iss", "'iss'.*ssim"),
        ("--metrics", ",", "ssim"),
        ("--device", "gpu", "cpu, cuda or cuda:N"),
        ("--device", "cuda:99", "CUDA devices"),
        ("--channels", 2, "1, 3"),
        ("--epochs", 0, "--epochs: '0' is not from 1 to"),
        ("--epochs", 1.5, "whole number"),
        ("--num_samples", 0, "at least 1|from 1"),
        ("--num_samples", 10**12, "from 1 to"),
        ("--batch_size", -1, "from 1 to"),
        ("--codebook_size", 10**9, "from 2 to"),
        ("--hidden_channels", 10**9, "from 1 to"),
        ("--spike_steps", "many", "whole number"),
        ("--lr", "nan", "greater than 0 and at most 1"),
        ("--lr", "inf", "greater than 0 and at most 1"),
        ("--lr", 0, "'0' is not greater than 0 and at most 1 \\("),
        ("--temperature", 0, "'0' is not greater than 0 \\("),
        ("--max_minutes", "inf", "greater than 0"),
        ("--seed", -1, "from 0 to"),
        ("--image_size", 30, "multiple of 4"),
        ("--image_size", 4, "from 8 to"),
        ("--sample_steps", 1000, "16 timesteps"),
        ("--train_images", 1000, "from 1 to 120"),
        ("--temperature", "auto", "more than 64 images that no training sees, not 0"),
        ("--metrics", "mse,classifier", "no classifier"),
        ("--metrics", "fad", "5000 generated images at least|no fad"),
    ],
)
def test_wrong_values_name_the_right_ones(option, value, expected, mistake, small, tmp_path):
    line = mistake(*small, "--result_path", tmp_path, option, value)
    assert re.search(expected, line), line
    assert not files(tmp_path), "a mistake leaves nothing behind"


# ---- mistakes with files and folders ----


def test_data_that_is_not_there(mistake, tmp_path):
    line = mistake("--dataset_name", "ImageFolder", "--data_path", tmp_path / "none", "--result_path", tmp_path)
    assert str(tmp_path / "none") in line and not files(tmp_path)


def test_a_run_that_is_already_there(mistake, run, small):
    result = run.parent / "result"
    shutil.copytree(run, result / "ImageFolder" / "snn-vq-vae")
    for stage in ("all", "vqsvae", "sdid"):
        line = mistake(*small, "--result_path", result, "--stage", stage)
        assert f"--resume {result / 'ImageFolder' / 'snn-vq-vae'}" in line and "--result_path" in line


@pytest.mark.parametrize("stage", ["all", "sdid", "sample", "evaluate"])
def test_nothing_to_work_with(stage, mistake, small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    expected = {"all": "cannot write"}.get(stage, "model.pth does not exist")
    options = small if stage == "all" else of_network(small)
    assert expected in mistake(*options, "--result_path", tmp_path / "file", "--stage", stage)


@pytest.mark.parametrize("option", ["--result_path", "--data_path", "--start_from", "--checkpoint", "--fad_weights"])
def test_a_path_that_is_not_utf_8(option, mistake, small, tmp_path):
    """As a shell passes bytes that are none. Logs, reports and TensorBoard could not write it."""
    path = f"{tmp_path}/b\udcfccher"
    base = () if option == "--checkpoint" else small
    if option in ("--start_from", "--checkpoint", "--fad_weights"):
        os.mkdir(path)
    if option == "--start_from":
        (Path(path) / "config.json").write_text(json.dumps({"dataset_name": "ImageFolder"}))
    line = mistake(*base, "--result_path", tmp_path / "result", option, path)
    assert f"{option} " in line and "is not UTF-8" in line and "rename it" in line
    assert not (tmp_path / "result").exists() and (option != "--result_path" or not os.path.exists(path))


@pytest.mark.parametrize(("commit", "program"), [("abc", "git commit abc"), (None, "the copy of this program")])
def test_a_run_says_which_program_can_resume_it(commit, program, mistake, run):
    """A copy without git has no commit that could be named."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "git_commit": commit}))
    state = torch.load(run / "last.pth", weights_only=True)
    for changed, fault in (({"version": 1}, "has version 1"), ({"model": {}}, "does not fit its config.json")):
        torch.save({**state, **changed}, run / "last.pth")
        line = mistake("--resume", run, "--diffusion_epochs", 3)
        assert fault in line and f"with {program}" in line and "None" not in line


@pytest.mark.parametrize("there", [False, True])
def test_resume_of_something_else(there, mistake, tmp_path):
    folder = tmp_path if there else tmp_path / "none"
    for resumed in (folder, folder / "last.pth"):
        assert f"{folder} is not a run folder" in mistake("--resume", resumed)


@pytest.mark.parametrize("content", ["{", "[1]", "[]"])
def test_damaged_config(content, mistake, run):
    (run / "config.json").write_text(content)
    assert str(run) in mistake("--resume", run) and "config.json" in mistake("--resume", run)


def test_options_that_contradict_the_run(mistake, run):
    before = [path.read_bytes() for path in files(run)]
    for option, value in (("--lr", 0.5), ("--codebook_size", 9), ("--seed", 1), ("--epochs", 3), ("--train_images", 5)):
        line = mistake("--resume", run, option, value)
        assert option in line and "omit" in line
    for option, value in (("--dataset_name", "MNIST"), ("--spike_steps", 2), ("--image_size", 20)):
        assert option in mistake("--checkpoint", run / "model.pth", option, value)
    assert before == [path.read_bytes() for path in files(run)]


def test_metrics_that_a_model_has_not(mistake, grey, tmp_path):
    options = ("--model", "snn-vae", "--metrics", "mse,codebook", "--result_path", tmp_path)
    assert "--metrics codebook: snn-vae has no codes" in mistake(*grey, *options) and not files(tmp_path)


def test_options_that_exclude_each_other(mistake, run):
    assert "--checkpoint" in mistake("--resume", run, "--checkpoint", run / "model.pth")
    assert "omit --result_path" in mistake("--resume", run, "--result_path", run.parent)
    auto = ("--temperature", "auto", "--final_temperature", 0.7)
    assert "leave out --final_temperature" in mistake("--checkpoint", run, *auto)
    for stage in ("vqsvae", "sdid"):
        assert "--resume" in mistake("--checkpoint", run / "model.pth", "--stage", stage)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", "no checkpoint that can be read"),
        ("samples", "samples/model.pth does not exist"),
        ("none.pth", "does not exist"),
        ("half.pth", "no checkpoint that can be read"),
        ("tensor.pth", "holds a Tensor"),
        ("last.pth", "is what --resume reads: name the model.pth beside it"),
        ("diff_result/diff_model.pth", "does not hold the weights of the autoencoder"),
    ],
)
def test_file_that_is_no_autoencoder(name, expected, mistake, run):
    (run / "half.pth").write_bytes((run / "model.pth").read_bytes()[:2000])
    torch.save(torch.zeros(2), run / "tensor.pth")
    path = run / name
    options = () if path.parent == run else ("--dataset_name", "Digits")
    line = mistake("--checkpoint", path, *options)
    assert expected in line and str(path) in line


def test_denoiser_that_does_not_fit(mistake, run):
    path = run / "diff_result" / "diff_model.pth"
    torch.save(SDID(9, 4, 4).state_dict(), path)
    line = mistake("--checkpoint", run / "model.pth")
    assert str(path) in line and "9 codes" in line and "8" in line
    shutil.copy(run / "model.pth", path)
    assert f"{path} does not hold the weights of a denoiser" in mistake("--checkpoint", run / "model.pth")
    path.unlink()
    assert f"{path} does not exist" in mistake("--checkpoint", run / "model.pth")


def test_checkpoint_of_another_kind_of_image(mistake, grey, tmp_path):
    model = build_model("snn-vq-vae", channels=3, codebook_size=8, embedding_dim=4, spike_steps=2, hidden_channels=4)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for stage in ("all", "sample"):
        line = mistake(*grey, "--checkpoint", tmp_path / "model.pth", "--stage", stage)
        assert "3 channels" in line and "ImageFolder has 1" in line
    size = ("--codebook_size", 9, "--result_path", tmp_path / "result", "--stage", "sdid")
    (tmp_path / "result" / "ImageFolder").mkdir(parents=True)
    grey_model = build_model(
        "snn-vq-vae", channels=1, codebook_size=8, embedding_dim=4, spike_steps=2, hidden_channels=4
    )
    (tmp_path / "result" / "ImageFolder" / "snn-vq-vae").mkdir()
    torch.save(grey_model.state_dict(), tmp_path / "result" / "ImageFolder" / "snn-vq-vae" / "model.pth")
    assert "--codebook_size" in mistake(*grey, *size)


def test_results_elsewhere(cli, mistake, run, tmp_path):
    """What an evaluation writes goes to a run folder of its own where one is named; the run's is left as it is."""
    before = {path: path.read_bytes() for path in files(run)}
    new = tmp_path / "new"
    outcome = cli("--checkpoint", run, "--seed", 7, "--num_samples", 5, "--result_path", new)
    assert (outcome.status, outcome.err) == (0, "") and f"the results are in {new}:" in outcome.out
    assert {path: path.read_bytes() for path in files(run)} == before
    assert all((new / name).exists() for name in ("metrics.json", "samples/images.npz", "samples/grid.png"))
    records = json.loads((new / "metrics.json").read_text())
    assert records and all(record["checkpoint"] == str(run / "model.pth") for record in records)
    assert cli("--checkpoint", run, "--stage", "sample", "--result_path", new).status == 0
    shutil.copytree(run, tmp_path / "other")
    assert "folder of another run" in mistake("--checkpoint", run, "--result_path", tmp_path / "other")


RESULTS = {"metrics": ("--metrics", "mse"), "samples": ("--stage", "sample"), "inpainted": ("--stage", "inpaint")}


@pytest.mark.parametrize("first", RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize("second", RESULTS.values(), ids=RESULTS)
def test_results_of_another_run_are_not_replaced(first, second, cli, mistake, run, small, tmp_path):
    other, new = shutil.copytree(run, tmp_path / "other"), tmp_path / "ImageFolder" / "snn-vq-vae"
    assert cli("--checkpoint", run, *first, "--result_path", new).status == 0
    before = {path: path.read_bytes() for path in files(new)}
    line = mistake("--checkpoint", other, *second, "--result_path", new)
    assert f"{new} holds results of {run}" in line and "--result_path" in line
    assert f"holds results of {run}" in mistake(*small, "--result_path", tmp_path), "a training"
    assert {path: path.read_bytes() for path in files(new)} == before
    assert cli("--checkpoint", run, *second, "--result_path", new).status == 0


def test_stage_2_on_other_images_than_stage_1(cli, mistake, run, small, grey, tmp_path):
    """Refused in the run, which would forget what the autoencoder was trained on; begun as a transfer, it is noted."""
    place = tmp_path / "result" / "ImageFolder"
    run = shutil.copytree(run, place / "snn-vq-vae")
    shutil.rmtree(run / "diff_result")
    (run / "last.pth").unlink()
    other = shutil.copytree(grey[3], tmp_path / "other images")
    next((other / "train").iterdir()).unlink()
    config = (run / "config.json").read_bytes()
    stage = (*small, "--stage", "sdid", "--data_path", other)
    line = mistake(*stage, "--result_path", place.parent)
    assert "train (119 images now, 120 in the run)" in line and f"--start_from {run}" in line
    assert "(115 images now, 120 in the run)" in mistake(
        *small, "--stage", "sdid", "--held_out", 5, "--result_path", place.parent
    )
    assert (run / "config.json").read_bytes() == config
    transfer = (
        *of_network(stage),
        "--diffusion_epochs",
        1,
        "--start_from",
        run,
        "--result_path",
        tmp_path / "transfer",
    )
    assert cli(*transfer).status == 0
    lineage = json.loads((tmp_path / "transfer" / "ImageFolder" / "snn-vq-vae" / "config.json").read_text())["lineage"]
    assert [entry["data"]["train"]["count"] for entry in lineage] == [120, 119]
    assert cli(*small, "--stage", "sdid", "--result_path", place.parent).status == 0, "the same images"


def test_stage_2_after_a_stage_1_that_was_stopped(cli, small, tmp_path):
    """It may be what is wanted, but not without a word."""
    place = (*small, "--result_path", tmp_path, "--stage")
    assert cli(*place, "vqsvae", "--max_minutes", 1e-4).status == 0
    outcome = cli(*place, "sdid", "--max_minutes", 1e-4)
    assert outcome.status == 0 and "was stopped before its last epoch: stage 2 learns the codes" in outcome.err


@pytest.mark.parametrize("option", [("--condition", "label"), ("--labels", "all"), ("--guidance", 1)])
def test_what_only_the_other_preset_has(option, mistake, run, small, tmp_path):
    """The remedy is named: the preset, or for what is trained already, a new run with it."""
    if option[0] != "--labels":
        line = mistake(*small, *option, "--result_path", tmp_path)
        assert f"sdid has no {option[0]}: add --preset improved, or leave it out" in line
    if option[0] != "--condition":
        line = mistake("--checkpoint", run, "--stage", "sample", *option)
        assert f"sdid has no {option[0]}" in line and "train a run with --preset improved" in line


def test_a_packed_copy_cannot_be_resumed(mistake, run, tmp_path):
    pack.main([str(run), str(tmp_path / "copy")])
    line = mistake("--resume", tmp_path / "copy")
    assert f"--start_from {tmp_path / 'copy'}" in line and "packed" in line


def test_metrics_of_stage_1_alone(cli, mistake, run):
    shutil.rmtree(run / "diff_result")
    shutil.rmtree(run / "samples")
    (run / "metrics.json").unlink()
    outcome = cli("--checkpoint", run, "--metrics", "mse,codebook")
    assert (outcome.status, outcome.err) == (0, "")
    records = [record["name"] for record in json.loads((run / "metrics.json").read_text())]
    assert records == ["mse", "codebook_usage", "codebook_perplexity"] and not (run / "samples").exists()
    for others in ("mse,energy", "fad"):
        assert "diff_model.pth does not exist" in mistake("--checkpoint", run, "--metrics", others)


def test_data_that_is_not_the_runs(mistake, run, colour):
    for way in (("--resume", run), ("--checkpoint", run / "model.pth")):
        line = mistake(*way, "--data_path", colour[3])
        assert str(colour[3]) in line and "(3, 16, 16)" in line and "(1, 16, 16)" in line


@pytest.fixture
def own_data(cli, tmp_path, grey, small):
    """A folder of images, and a run on it."""
    data = shutil.copytree(grey[3], tmp_path / "own")
    small = (*("--dataset_name", "ImageFolder", "--image_size", 16), *small[6:], "--data_path", data)
    assert cli(*small, "--epochs", 1, "--diffusion_epochs", 1, "--result_path", tmp_path / "result").status == 0
    return data, tmp_path / "result" / "ImageFolder" / "snn-vq-vae"


@pytest.mark.parametrize(
    ("split", "change", "expected"),
    [
        ("train", "removed", "train (119 images now, 120 in the run)"),
        ("train", "added", "train (121 images now, 120 in the run)"),
        ("train", "altered", "train (120 images now, 120 in the run)"),
        ("test", "added", "test (5 images now, 4 in the run)"),
    ],
)
def test_data_that_has_changed(split, change, expected, cli, mistake, own_data):
    data, run = own_data
    image = data / split / "000.png"
    if change == "removed":
        image.unlink()
    elif change == "added":
        shutil.copy(image, image.with_name("new.png"))
    else:
        Image.fromarray(np.asarray(Image.open(image)) ^ 1).save(image)
    assert expected in mistake("--resume", run, "--diffusion_epochs", 2)
    outcome = cli("--checkpoint", run, "--metrics", "mse")
    assert outcome.status == 0 and outcome.err.startswith("warning: ") and expected in outcome.err
    (record,) = [each for each in json.loads((run / "metrics.json").read_text()) if each["name"] == "mse"]
    assert expected in record["data_change"]


def test_a_run_finds_its_data_from_anywhere(cli, own_data, tmp_path, monkeypatch):
    """A relative path is stored absolute: a folder of the same name elsewhere is not taken for it; ~ is understood."""
    data, run = own_data
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, path in enumerate(("own", "~/own")):
        result = tmp_path / f"result {number}"
        own = ("--dataset_name", "ImageFolder", "--image_size", 16, "--data_path", path, "--result_path", result)
        assert cli(*own, *SMALL, "--epochs", 1, "--stage", "vqsvae").status == 0
        config = json.loads((result / "ImageFolder" / "snn-vq-vae" / "config.json").read_text())
        assert config["data_path"] == str(data)
        assert config["data"]["train"]["count"] == 120 and config["data"]["test"]["count"] == 4
    (tmp_path / "elsewhere" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("--checkpoint", run, "--metrics", "mse").status == 0


def test_the_data_is_in_the_last_checkpoint(mistake, own_data):
    _, run = own_data
    config = json.loads((run / "config.json").read_text())
    config["data"]["test"]["sha256"] = "0" * 16
    (run / "config.json").write_text(json.dumps(config))
    assert "last.pth is of a run with other training data" in mistake("--resume", run, "--diffusion_epochs", 2)


def test_options_of_one_call_do_not_stick(cli, run):
    """What a training was evaluated with is no default of a later evaluation; a resumed call may type it back."""
    config = json.loads((run / "config.json").read_text())
    assert config["num_samples"] == 5
    assert resolve(["--checkpoint", str(run)]).options.drawing.num_samples is None
    assert resolve(["--resume", str(run)]).options.drawing.num_samples == 5
    assert resolve(["--resume", str(run), "--num_samples", "auto"]).options.drawing.num_samples is None
    typed = resolve(["--checkpoint", str(run), "--metrics", "mse, ssim"]).options.evaluation
    assert typed.metrics == ("mse", "ssim")
    assert resolve(["--checkpoint", str(run), "--metrics", "all"]).options.evaluation.metrics is None


def test_a_run_that_starts_from_another_has_its_preset(tmp_path):
    start = ["--start_from", str(ROOT / "pretrained" / "mnist"), "--stage", "sdid", "--result_path", str(tmp_path)]
    training = resolve([*start, "--diffusion_lr", "1e-3"]).options.training
    preset = PRESETS["improved"]
    assert (training.loss, training.ema_decay, training.diffusion_lr) == (preset["loss"], preset["ema_decay"], 1e-3)
    assert resolve([*start, "--preset", "faithful"]).options.training.ema_decay == 0


def test_every_value_knows_where_it_came_from(run):
    call = resolve(["--checkpoint", str(run), "--temperature", "0.5"])
    assert call.options.origins["temperature"] == "command line" and call.options.origins["spike_steps"] == str(run)
    assert call.options.origins["mask"] == "default" and call.options.autoencoder.spike_steps == 4
    options = resolve(["--preset", "improved", "--denoiser_blocks", "3"]).options
    assert (options.denoiser.denoiser_blocks, options.autoencoder.downsampling) == (3, 2)
    assert options.origins["downsampling"] == "--preset improved"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("spike_steps", "many", "--spike_steps in config.json"), ("readout", "other", "not one of both, rate")],
)
def test_a_config_with_impossible_values(name, value, expected, mistake, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, name: value}))
    assert expected in mistake("--checkpoint", run)


@pytest.mark.parametrize("content", ["text", "other stage", "no stage", "absent"])
def test_damaged_last_file(content, mistake, run):
    last = run / "last.pth"
    if content == "text":
        last.write_text("not a checkpoint")
    elif content == "absent":
        last.unlink()
    else:
        state = torch.load(last, weights_only=True)
        torch.save({**state, "stage": "vqsvae"} if content == "other stage" else {"model": state["model"]}, last)
    before = (run / "model.pth").read_bytes()
    assert str(last) in mistake("--resume", run)
    assert (run / "model.pth").read_bytes() == before


@pytest.mark.parametrize("target", ["metrics.json", "samples"])
def test_folder_that_cannot_be_written(target, cli, run):
    """A folder in place of a file, or a file in place of a folder, stops root as well."""
    if target == "samples":
        shutil.rmtree(run / "samples")
        (run / "samples").write_text("in the way")
    else:
        (run / "metrics.json").unlink()
        (run / "metrics.json").mkdir()
    outcome = cli("--checkpoint", run / "model.pth", "--num_samples", 5)
    assert outcome.status == 2 and outcome.err.startswith("error: cannot write ") and outcome.err.count("\n") == 1
    assert target in outcome.err


def test_images_that_are_all_the_same(mistake, small, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "data" / split / "one.png")
    line = mistake(*small, "--data_path", tmp_path / "data", "--result_path", tmp_path / "result")
    assert "uniform colour" in line and not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    "options", [("--train_images", 1), ("--batch_size", 1, "--train_images", 3), ("--batch_size", 999)]
)
def test_odd_sizes_that_work(options, cli, small, tmp_path):
    outcome = cli(*small, "--epochs", 1, "--diffusion_epochs", 1, "--result_path", tmp_path, *options)
    lines = outcome.err.splitlines()
    assert outcome.status == 0 and all("the codebook is collapsing" in line for line in lines), "too few images"


def test_out_of_memory(mistake, small, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    monkeypatch.setattr(training.Trainer, "_step", fail)
    assert "--batch_size" in mistake(*small, "--result_path", tmp_path)


def test_an_error_of_the_program_keeps_its_traceback(cli, run, monkeypatch):
    monkeypatch.setattr(program, "execute", lambda _: [][0])
    with pytest.raises(IndexError):
        cli("--checkpoint", run / "model.pth")


# ---- whole runs in a process of their own ----


def test_a_users_first_minutes(tmp_path, cli, monkeypatch):
    """The bundled data set: train, move the run, evaluate it; as typed in a shell, without one warning."""
    network = [option for option in SMALL if option not in ("--device", "cpu", "--precision", "float32")]
    arguments = (*network, *LIVELY, "--train_images", 100, "--epochs", 1, "--diffusion_epochs", 1)
    process = shell(*arguments, folder=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    run = "result/Digits/snn-vq-vae"
    assert "\x1b" not in process.stdout and "\r" not in process.stdout
    epochs = [line for line in process.stdout.splitlines() if " epoch " in line]
    assert [line.split(":")[0] for line in epochs] == [
        "stage 1 (vqsvae) epoch 1/1",
        "stage 2 (sdid) epoch 1/1",
    ]
    table, paths = process.stdout.split(f"the run is in {run}:\n")
    assert "metric" in table and all((tmp_path / line.strip()).exists() for line in paths.splitlines())

    records = (tmp_path / run / "metrics.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / run).rename(tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path)
    evaluated = cli("--checkpoint", "elsewhere/run/model.pth", "--num_samples", 5)
    assert (evaluated.status, evaluated.err) == (0, "") and "epoch" not in evaluated.out
    assert (tmp_path / "elsewhere" / "run" / "metrics.json").read_text() == records


def test_a_mistake_in_a_shell(tmp_path):
    process = shell("--dataset_name", "MNSIT", folder=tmp_path)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert "MNSIT" in process.stderr and "MNIST" in process.stderr.split("MNSIT")[1]
