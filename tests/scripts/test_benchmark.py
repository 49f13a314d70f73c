"""The benchmark runs as a user would run it, on networks too small to measure anything."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import PRECISION, ROOT

from models.neurons import IF, FromRest
from scripts import benchmark

SCRIPT = ROOT / "scripts" / "benchmark.py"
TASKS = {"stage1_train", "stage2_train", "encode", "sample"}


@pytest.fixture(autouse=True)
def events_as_usual():
    yield
    benchmark.use_events()


def test_all_modes_and_their_ratios(tmp_path):
    network = ("--spike_steps", "1", "--denoiser_channels", "2", "--batch_size", "2")
    small = (*network, "--repeats", "1", "--device", "cpu", *PRECISION)
    file = tmp_path / "speed.json"
    done = subprocess.run([sys.executable, SCRIPT, *small, "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(file.read_text())
    for mode in ("reference", "dense", "fast"):
        assert set(measured[mode]["spikes"]) == {"conv2", "conv3", "conv4", "conv5", "conv6"}
        assert all(0 <= share <= 1 for share in measured[mode]["spikes"].values())
        assert all(measured[mode][task] > 0 for task in TASKS)
        assert measured[mode]["peak_memory_mib"] > 0
    for base in ("reference", "dense"):
        ratio = measured[f"fast_over_{base}"]
        assert set(ratio) == TASKS
        for task in TASKS:
            assert abs(ratio[task] - measured["fast"][task] / measured[base][task]) < 0.006
    assert measured["machine"]["threads"] >= 1
    assert measured["reference"]["precision"] == "float32"
    assert "fast / dense" in done.stdout and "stage2_train" in done.stdout


def test_figure_of_time_against_spikes(tmp_path):
    small = ("--spike_steps", 1, "--denoiser_channels", 2, "--repeats", 1, "--json", tmp_path / "points.json")
    benchmark.main([*map(str, ("--figure", tmp_path / "pass.png", *small))])
    points = json.loads((tmp_path / "points.json").read_text())["denoiser_pass"]
    assert all(point["dense"] > 0 < point["events"] and 0 <= point["share"] <= 1 for point in points)
    assert (tmp_path / "pass.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--run", str(tmp_path), "--mode", "fast"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not a run folder: it has no config.json\n"


def test_each_network_has_the_spike_steps_and_neurons_of_the_run(tmp_path):
    shutil.copytree(ROOT / "pretrained" / "fmnist-faithful", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    changed = {"spike_steps": 4, "denoiser_spike_steps": 2, "neuron": "if", "tau": 2.0, "v_threshold": 0.5}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | changed))
    options = argparse.Namespace(spike_steps=None, denoiser_channels=None, run=tmp_path / "run")
    networks = benchmark.networks(options)
    assert [network.spike_steps for network in networks] == [4, 2]
    neurons = [layer for network in networks for layer in network.modules() if isinstance(layer, FromRest)]
    assert {(type(layer), layer.v_threshold) for layer in neurons} == {(IF, 0.5)} and len(neurons) == 11


def test_idle_threads_sleep_unless_the_user_says_otherwise():
    show = "import os, pipeline.runtime.threads; print(os.environ['OMP_WAIT_POLICY'])"
    others = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for own, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", show], capture_output=True, text=True, cwd=ROOT, env={**others, **own}, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    "module",
    (
        "pipeline.program",
        "scripts.benchmark",
        "scripts.evaluate",
        "scripts.export_nir",
        "scripts.report",
    ),
)
def test_it_is_set_before_torch_is_there(module):
    show = (
        "import sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit('threads' if 'pipeline.runtime.threads' in sys.modules else 'torch')\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "threads\n"
