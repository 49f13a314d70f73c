"""Programs on a terminal that knows only ASCII: the last line of hours of work may have a "µ" in it."""

import importlib
import io
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

MODULES = ["main", *(f"scripts.{path.stem}" for path in sorted((ROOT / "scripts").glob("*.py")))]
PROGRAMS = [name for name in MODULES if "__main__" in (ROOT / f"{name.replace('.', '/')}.py").read_text("utf-8")]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_can_print_anything(name, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert not exit_.value.code
    print("µJ, é, \udcc3", file=stream)


@pytest.mark.parametrize("program", ["main.py", "scripts/results_table.py"])
def test_in_a_shell_of_ascii(program, run, tmp_path):
    """µJ in the table, é in the path and in a file that is written and read."""
    moved, table = run.rename(run.with_name("réseau")), tmp_path / "table.md"
    evaluates = program == "main.py"
    options = ("--checkpoint", moved, "--metrics", "energy") if evaluates else (moved, "--output", table)
    records = json.loads((moved / "metrics.json").read_text(encoding="utf-8"))
    (moved / "metrics.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    environment = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, program, *options], cwd=ROOT, env=environment, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout.isascii()
    assert rb"\xb5J an image" in process.stdout if evaluates else "µJ an image" in table.read_text(encoding="utf-8")
