"""Places that a script is told to write to are tried before it computes, and what it has computed is not lost."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from pipeline.evaluation.records import write_records
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from scripts import benchmark, evaluate, export_nir, report, results_table

RECORD = {"name": "fid", "value": 1.5, "protocol": "so", "split": "test", "num_generated": 2, "num_real": 2}
SCRIPTS = {
    "evaluate --output": (evaluate, "evaluate", ("--dataset_name", "Digits", "--output")),
    "report --output": (report, "write_report", ("RUN", "--output")),
    "results_table --output": (results_table, "read_rows", ("RUN", "--output")),
    "results_table --plot": (results_table, "read_rows", ("RUN", "--plot")),
    "results_table --classes_plot": (results_table, "read_rows", ("RUN", "--classes_plot")),
    "benchmark --json": (benchmark, "in_own_process", ("--json",)),
    "benchmark --figure": (benchmark, "draw_figure", ("--figure",)),
    "export_nir --output": (export_nir, "networks", ("RUN", "--output")),
    "export_nir --raster": (export_nir, "networks", ("RUN", "--raster")),
}


def computed(*_):
    raise AssertionError("computed before the place was tried")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("place", ["is a folder", "is below a file", "has no such format"])
def test_a_place_is_tried_before_anything_is_computed(name, place, run, tmp_path, capsys, monkeypatch):
    script, compute, arguments = SCRIPTS[name]
    figure = name.split()[1] in ("--plot", "--classes_plot", "--figure", "--raster")
    path = {
        "is a folder": tmp_path / "folder.png",
        "is below a file": tmp_path / "file" / "result.png",
        "has no such format": tmp_path / "result.odd",
    }[place]
    if (place == "has no such format" and not figure) or (place == "is a folder" and name == "export_nir --output"):
        pytest.skip("that is no fault there")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(script, compute, computed)
    with pytest.raises(SystemExit) as exit_:
        script.main([*(str(run) if word == "RUN" else word for word in arguments), str(path)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and str(path.parent) in error and "cannot" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path != run.parent) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", computed)
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        evaluate.main(["--dataset_name", "Digits", "--output", str(tmp_path / "result.json")])
    assert "Permission denied" in capsys.readouterr().err


def test_what_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    """As where the disk fills up meanwhile."""
    path = tmp_path / "records.json"
    monkeypatch.setattr(evaluate, "evaluate", lambda _: path.mkdir() or [RECORD])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--dataset_name", "Digits", "--output", str(path)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and "fid" in out and "1.5000" in out and f"cannot write {path}" in err


def test_what_cannot_be_printed_is_written(tmp_path, monkeypatch):
    """As where nobody reads it any more: by a script, and in metrics.json of a run."""

    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    path = tmp_path / "records.json"
    monkeypatch.setattr(evaluate, "evaluate", lambda _: [RECORD])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        with pytest.raises(BrokenPipeError), RunFolder(tmp_path / "run") as run:
            write_records(run, [RECORD], Machine(torch.device("cpu"), bf16=False), "weights")
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(["--dataset_name", "Digits", "--output", str(path)])
    assert exit_.value.code == 141 and json.loads(path.read_text()) == [RECORD]
    assert RunFolder(tmp_path / "run").read_records()[0]["value"] == RECORD["value"]


def test_nobody_reads_the_table(run):
    """The script ends as other programs do, without a word."""
    command = f"{sys.executable} -u scripts/results_table.py {run} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
