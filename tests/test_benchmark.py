"""The benchmark runs as a user would run it, on networks too small to measure anything."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import PRECISION

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
TASKS = {"stage1_train", "stage2_train", "encode", "sample"}


def test_both_modes_and_their_ratio(tmp_path):
    network = ("--spike_steps", "1", "--denoiser_channels", "2", "--batch_size", "2")
    small = (*network, "--repeats", "1", "--device", "cpu", *PRECISION)
    file = tmp_path / "speed.json"
    done = subprocess.run([sys.executable, SCRIPT, *small, "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert set(figures["ratio"]) == TASKS
    for mode in ("plain", "fast"):
        assert all(figures[mode][task] > 0 for task in TASKS)
        assert figures[mode]["peak_memory_mib"] > 0
    for task in TASKS:
        assert abs(figures["ratio"][task] - figures["fast"][task] / figures["plain"][task]) < 0.006
    assert figures["machine"]["threads"] >= 1
    assert figures["plain"]["precision"] == "float32"
    assert "ratio" in done.stdout and "stage2_train" in done.stdout
