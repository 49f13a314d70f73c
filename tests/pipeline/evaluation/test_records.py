"""metrics.json: what each record says of how it came about, and what becomes of those that are there already."""

import json

import pytest
import torch

from pipeline.run_folder import PACKAGES
from pipeline.runtime import device as machine
from pipeline.runtime.device import Machine, describe_machine


def read(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_each_metric_says_what_it_depends_on(finished):
    for record in read(finished.path):
        assert record["precision"] == "float32" and record["threads"] == 1
        assert record["processor"] and record["versions"].keys() == set(PACKAGES) and len(record["weights"]) == 16
    assert len({record["weights"] for record in read(finished.path)}) == 1


def test_a_later_call_keeps_the_metrics_it_does_not_compute(cli, run):
    before = {record["name"]: record for record in read(run)}
    outcome = cli("--checkpoint", run, "--metrics", "mse,codebook", "--seed", 7)
    assert outcome.status == 0 and "dropped" not in outcome.out
    after = {record["name"]: record for record in read(run)}
    assert len(read(run)) == len(before) == len(after)
    computed = {"mse", "codebook_usage", "codebook_perplexity"}
    assert {name for name in after if after[name] != before[name]} == computed
    assert {after[name]["seed"] for name in computed} == {7} and after["mse"]["value"] == before["mse"]["value"]


def test_what_is_not_the_same_metric_stays(cli, run):
    """Of another split or feature network."""
    first = read(run)[0]
    others = [{**first, key: "another"} for key in ("split", "network")]
    replaced = [{**first, "protocol": "in other words", "dataset": "another", "value": -1}]
    (run / "metrics.json").write_text(json.dumps([*others, *replaced, *read(run)[1:]]), encoding="utf-8")
    assert cli("--checkpoint", run, "--metrics", first["name"].split("_")[0]).status == 0
    assert all(each in read(run) for each in others) and replaced[0] not in read(run)
    assert len(read(run)) == len({json.dumps(each) for each in read(run)})


def test_samples_drawn_otherwise_have_records_of_their_own(cli, run):
    """And those drawn in the same way replace each other: no table can mix a value with other settings."""
    calls = [("--sample_steps", 2), ("--sample_steps", 3), ("--temperature", 0.9), ("--seed", 7), ("--sample_steps", 2)]
    before = [record for record in read(run) if record["name"] == "energy_sample"]
    for call in calls:
        assert cli("--checkpoint", run, "--metrics", "energy", *call).status == 0
    found = [record for record in read(run) if record["name"] == "energy_sample"]
    settings = [record["sampling"] for record in found]
    assert len(before) == 1 and before[0] in found and len(found) == 5
    assert [each["sample_steps"] for each in settings].count(2) == 1 and {each["seed"] for each in settings} == {42, 7}
    passes = {(record["sampling"]["sample_steps"], record["passes"]) for record in found}
    assert passes == {(2, 2), (3, 3), (16, 16)} and len({record["protocol"] for record in found}) == 1
    assert sum(record["name"] == "energy_encode" for record in read(run)) == 1, "of no samples"


def test_records_that_may_be_of_the_same_settings_are_replaced(cli, run):
    """A temperature is the same if it was chosen; and what is older than the fields does not say what it is of."""
    (record,) = [record for record in read(run) if record["name"] == "energy_sample"]
    chosen = {**record, "sampling": {**record["sampling"], "temperature_chosen": True}}
    older = {key: value for key, value in record.items() if key != "sampling"}
    another = {**record, "sampling": {**record["sampling"], "temperature": 0.9}}
    (run / "metrics.json").write_text(json.dumps([chosen, older, another]), encoding="utf-8")
    assert cli("--checkpoint", run, "--metrics", "energy").status == 0
    found = [each["sampling"] for each in read(run) if each["name"] == "energy_sample"]
    assert found == [another["sampling"], record["sampling"]]


def test_what_a_record_depends_on_is_in_fields(finished):
    records = {record["name"]: record for record in read(finished.path)}
    drawn, seen = records["energy_sample"], records["mse"]
    assert drawn["sampling"].items() >= {
        "seed": 42, "temperature": 0.65, "final_temperature": None, "sample_steps": 16, "reveal_order": "random",
        "guidance": 0.0, "labels": [],
    }.items()  # fmt: skip
    assert "sampling" not in seen
    for record in records.values():
        assert record["dataset"] == "ImageFolder" and len(record["real_sha256"]) == 16


@pytest.mark.parametrize("change", ["autoencoder", "denoiser", "unknown"])
def test_metrics_of_other_weights_are_dropped_with_a_word(change, cli, run):
    """Also those of the other network, and those of before records named their weights."""
    if change == "unknown":
        keys = ("weights", "precision", "threads", "processor", "versions")
        old = [{key: value for key, value in record.items() if key not in keys} for record in read(run)]
        (run / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    else:
        path = run / {"autoencoder": "model.pth", "denoiser": "diff_result/diff_model.pth"}[change]
        weights = torch.load(path, weights_only=True)
        torch.save({name: value * 1.01 if value.dim() > 1 else value for name, value in weights.items()}, path)
    outcome = cli("--checkpoint", run, "--metrics", "mse")
    (line,) = [line for line in outcome.out.splitlines() if "dropped metrics of other weights" in line]
    assert str(run / "metrics.json") in line and "ssim, codebook_usage" in line and " mse" not in line
    assert [record["name"] for record in read(run)] == ["mse"]


@pytest.mark.parametrize("content", ["{", '{"name": 1}', '[{"name": "mse", "value": 1}]', "[3]"])
def test_a_damaged_file_is_named_before_anything_is_drawn(content, cli, run, monkeypatch):
    monkeypatch.setattr("pipeline.sampling.image_models.CodeDiffusion.draw_images", None)
    (run / "metrics.json").write_text(content, encoding="utf-8")
    for arguments in (("--checkpoint", run), ("--resume", run, "--diffusion_epochs", 3)):
        outcome = cli(*arguments)
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and str(run / "metrics.json") in outcome.err


def test_the_machine_in_words(monkeypatch, tmp_path):
    for variable in machine.RESTRICTIONS:
        monkeypatch.delenv(variable, raising=False)
    listing = tmp_path / "cpuinfo"
    listing.write_text("model name\t: A\nflags\t\t: avx2 avx512f amx_bf16 avx512_bf16\n", encoding="utf-8")
    monkeypatch.setattr(machine, "CPU_LISTING", listing)
    cpu = torch.device("cpu")
    assert describe_machine(cpu) == {"processor": "A, amx_bf16", "threads": torch.get_num_threads()}
    listing.write_text("model name\t: B\nflags\t\t: avx2\n", encoding="utf-8")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert describe_machine(cpu)["processor"] == "B, avx2, ONEDNN_MAX_CPU_ISA=AVX2"
    monkeypatch.setattr(machine, "CPU_LISTING", tmp_path / "absent")
    assert describe_machine(cpu)["processor"]
    assert [Machine(cpu, bf16).precision for bf16 in (False, True)] == ["float32", "bf16"]
