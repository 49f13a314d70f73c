"""Where weights come from: `lineage` in config.json, through every way in which weights are passed on."""

import json
import subprocess

import pytest
import torch
from helpers import run_in, without

from datasets import digest
from pipeline.checkpoints import load_weights, save_weights
from pipeline.lineage import costs, images_before, known
from pipeline.run_folder import RunFolder, program_version
from scripts import pack, results_table

STAGE_1 = ("--epochs", "--revive_codes", "--clipped_error")


def lineage(run):
    return json.loads((run / "config.json").read_text())["lineage"]


def weights(run):
    return [digest(load_weights(run / name)) for name in ("model.pth", "diff_result/diff_model.pth")]


@pytest.fixture
def start(small):
    """Options of a training of stage 2 that starts from a run."""
    return (*without(small, *STAGE_1), "--stage", "sdid", "--diffusion_epochs", 1, "--start_from")


def test_a_run_from_scratch_has_an_entry_for_each_stage(finished):
    first, second = lineage(finished.path)
    config = json.loads((finished.path / "config.json").read_text())
    assert [first["stage"], second["stage"]] == ["vqsvae", "sdid"]
    assert [first["weights_after"], second["weights_after"]] == weights(finished.path)
    for entry in (first, second):
        assert entry["weights_before"] is None and entry["images"] == 2 * 120 and entry["minutes"] > 0
        assert entry["data"] == {"dataset_name": "ImageFolder", **config["data"]}
        assert entry["precision"] == "float32" and entry["processor"] and entry["processes"] == 1
        assert (entry["git_commit"], entry["git_changed"]) == (config["git_commit"], config["git_changed"])
    assert first["options"]["epochs"] == 2 and "diffusion_epochs" not in first["options"]
    assert second["options"]["diffusion_epochs"] == 2 and second["options"]["denoiser_channels"] == 4
    assert "epochs" not in second["options"] and "seed" not in second["options"], "a default"
    assert [cost.images for cost in costs([first, second])] == [240, 240]


def test_weights_that_are_trained_further_keep_their_lineage(cli, run, start, tmp_path):
    before = lineage(run)
    assert cli(*start, run, "--result_path", tmp_path / "further").status == 0
    further = run_in(tmp_path / "further")
    *kept, last = lineage(further)
    assert kept == before and last["images"] == 120 and last["options"]["diffusion_epochs"] == 1
    assert (last["weights_before"], last["weights_after"]) == (before[1]["weights_after"], weights(further)[1])
    assert [cost.images for cost in costs(lineage(further))] == [240, 360]
    assert images_before(lineage(further), "sdid", 120) == 240 and images_before(lineage(further), "vqsvae", 240) == 0


def test_a_new_denoiser_has_a_lineage_of_its_own(cli, run, start, tmp_path):
    assert cli(*start, run, "--new_denoiser", "--result_path", tmp_path / "new").status == 0
    first, second = lineage(run_in(tmp_path / "new"))
    assert first == lineage(run)[0] and second["weights_before"] is None and second["images"] == 120
    assert images_before([first, second], "sdid", 120) == 0


def test_an_entry_that_sums_up_trainings_ends_where_the_log_ends():
    summed_up = {"stage": "sdid", "note": "of before", "weights_before": None, "images": 900, "minutes": 9}
    later = {"stage": "sdid", "weights_before": "a", "images": 50, "minutes": 1}
    assert images_before([summed_up], "sdid", 300) == 600 and images_before([summed_up, later], "sdid", 50) == 900


def test_both_stages_trained_further(cli, run, small, tmp_path):
    options = (*small, "--epochs", 1, "--diffusion_epochs", 1, "--start_from", run, "--result_path", tmp_path / "both")
    assert cli(*options).status == 0
    entries = lineage(run_in(tmp_path / "both"))
    assert entries[:2] == lineage(run) and [entry["stage"] for entry in entries[2:]] == ["vqsvae", "sdid"]
    assert [entry["weights_before"] for entry in entries[2:]] == weights(run)
    assert [entry["weights_after"] for entry in entries[2:]] == weights(run_in(tmp_path / "both"))


def test_weights_of_unknown_origin_are_called_so(cli, run, start, tmp_path):
    state = load_weights(run / "model.pth")
    save_weights(run / "model.pth", {name: value + 0 if value.dim() else value + 1 for name, value in state.items()})
    assert cli(*start, run, "--result_path", tmp_path / "further").status == 0
    first, unknown, second, last = lineage(run_in(tmp_path / "further"))
    assert [first, second] == lineage(run) and last["weights_before"] == second["weights_after"]
    assert unknown == {"stage": "vqsvae", "weights_after": weights(run)[0]} != {"weights_after": first["weights_after"]}
    (cost,) = costs([first, unknown])
    assert cost.images == 240 and cost.stage == "stage 1 (vqsvae), and trainings that are not known"


def test_an_autoencoder_without_codes_of_unknown_origin(cli, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "snn-vae"}))
    save_weights(folder / "model.pth", {"a": torch.ones(1)})
    assert [entry["stage"] for entry in known(RunFolder(folder), of_denoiser=False)] == ["vae"]


def test_a_run_from_before_there_was_a_lineage(cli, run, start, tmp_path):
    config = json.loads((run / "config.json").read_text())
    del config["lineage"]
    (run / "config.json").write_text(json.dumps(config))
    assert cli(*start, run, "--result_path", tmp_path / "further").status == 0
    *unknown, last = lineage(run_in(tmp_path / "further"))
    assert unknown == [
        {"stage": stage, "weights_after": digest}
        for stage, digest in zip(("vqsvae", "sdid"), weights(run), strict=True)
    ]
    assert last["weights_before"] == unknown[1]["weights_after"]


def test_a_training_that_is_resumed_is_one_entry(cli, small, finished, tmp_path):
    outcome = cli(*small, "--result_path", tmp_path, "--max_minutes", 1e-4)
    stopped, sittings = run_in(tmp_path), 0
    while "reached" in outcome.out:
        assert sum(entry["images"] for entry in lineage(stopped)) > 0
        outcome, sittings = cli("--resume", stopped, "--max_minutes", 3e-3), sittings + 1
        assert sittings < 100
    assert sittings > 1 and outcome.status == 0
    assert weights(stopped) == weights(finished.path)
    one, other = lineage(stopped), lineage(finished.path)
    assert len(one) == 2 and all("resumed" not in entry for entry in one)
    for key in ("stage", "options", "data", "weights_before", "weights_after", "images"):
        assert [entry[key] for entry in one] == [entry[key] for entry in other], key


def test_a_training_that_is_resumed_for_more_epochs_says_so(cli, run):
    assert cli("--resume", run, "--diffusion_epochs", 3).status == 0
    first, second = lineage(run)
    assert (first["options"]["epochs"], second["options"]["diffusion_epochs"]) == (2, 3) and second["images"] == 3 * 120


def test_another_machine_is_noted_when_a_training_is_resumed(cli, small, tmp_path, monkeypatch):
    assert cli(*small, "--result_path", tmp_path, "--max_minutes", 1e-4).status == 0
    monkeypatch.setattr("pipeline.lineage.describe_machine", lambda device: {"processor": "another", "threads": 64})
    stopped = run_in(tmp_path)
    for _ in range(2):
        assert cli("--resume", stopped, "--max_minutes", 1e-4).status == 0
    (entry,) = lineage(stopped)
    assert entry["processor"] != "another" and [each["processor"] for each in entry["resumed"]] == ["another"]


def test_codes_with_other_numbers_are_other_weights(cli, small, tmp_path):
    assert cli(*small, "--sort_codes", "--stage", "vqsvae", "--result_path", tmp_path).status == 0
    (entry,) = lineage(run_in(tmp_path))
    assert entry["weights_after"] == digest(load_weights(run_in(tmp_path) / "model.pth"))


def test_packing_keeps_the_lineage(run, tmp_path, capsys):
    pack.main([str(run), str(tmp_path / "copy"), "--int8"])
    entries = lineage(tmp_path / "copy")
    assert [entry for entry in entries if "packed" not in entry] == lineage(run)
    for entry, before, after in zip(entries[1::2], weights(run), weights(tmp_path / "copy"), strict=True):
        assert entry["packed"] and (entry["weights_before"], entry["weights_after"]) == (before, after)
    assert str(tmp_path) not in json.dumps(entries), "no path of this machine"


def test_the_table_shows_what_all_trainings_cost(run, capsys):
    results_table.main([str(run)])
    out = capsys.readouterr().out
    assert "stage 1 (vqsvae): 240 images" in out and "stage 2 (sdid): 240 images" in out


@pytest.fixture
def repository(tmp_path):
    """A repository with a program in it, and a function that runs git there."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "main.py").write_text("1\n")
    (tmp_path / ".gitignore").write_text("result\n")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path, git("rev-parse", "HEAD").stdout.strip()


def test_changes_of_the_program_are_noted(repository):
    folder, commit = repository
    assert program_version(folder) == {"git_commit": commit, "git_changed": False}
    (folder / "notes.txt").write_text("not of the program")
    assert not program_version(folder)["git_changed"]
    (folder / "new.py").write_text("2\n")
    assert program_version(folder) == {"git_commit": commit, "git_changed": True}
    (folder / "new.py").unlink()
    (folder / "main.py").write_text("3\n")
    assert program_version(folder)["git_changed"]


def test_a_copy_inside_another_repository_has_no_commit(repository):
    folder, _ = repository
    (folder / "copy").mkdir()
    assert program_version(folder / "copy") == {"git_commit": None, "git_changed": None}
