"""How far long work has come: bars, lines in a log file, and the time that is left."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm as tqdm_package
from helpers import ROOT
from PIL import Image

import image_files
import progress
from datasets import load_dataset
from pipeline.evaluation import feature_networks
from pipeline.runtime.device import Machine
from pipeline.sampling import batches, image_models
from pipeline.training import loop
from progress import Pace, in_words, progress_bar


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """tqdm's, which goes on only when told."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(tqdm_package.tqdm, "monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


def work(clock, seconds, **options):
    """Ten batches of ten images, each of which takes some seconds."""
    with progress_bar(100, "drawing", **options) as bar:
        for _ in range(10):
            clock.now += seconds
            bar.update(10)


def test_a_line_a_minute_where_stderr_is_a_file(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))
    work(clock, seconds=30)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 5 and "\r" not in sys.stderr.getvalue()
    assert lines[0] == "drawing: 20 % (20 of 100 images), 01:00 so far, 04:00 left"
    assert lines[1].startswith("drawing: 40 % (40 of 100 images), 02:00 so far")


@pytest.mark.parametrize("terminal", [False, True])
def test_short_work_and_other_processes_show_nothing(terminal, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal))
    work(clock, seconds=0.09)
    work(clock, seconds=30, shown=False)
    assert sys.stderr.getvalue() == ""


def test_a_bar_on_a_terminal_that_vanishes(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=True))
    work(clock, seconds=2)
    shown = sys.stderr.getvalue()
    assert "drawing:  50%|" in shown and shown.endswith("\r") and not shown.split("\r")[-2].strip()


def test_nobody_reads_the_lines(clock, monkeypatch):
    class Broken(Stderr):
        def write(self, text):
            raise BrokenPipeError

    for stream in (Broken(terminal=False), None):
        monkeypatch.setattr(sys, "stderr", stream)
        work(clock, seconds=30)


def test_the_time_left_leaves_out_the_first_step():
    pace = Pace(total=100)
    assert pace.seconds_left(1, 50.0) is None  # that step took 50 seconds
    assert pace.seconds_left(2, 51.0) is None
    assert pace.seconds_left(11, 60.0) == pytest.approx(89)  # ten seconds are enough
    assert Pace(100).seconds_left(1, 0.0) is None
    fast = Pace(total=1000)
    fast.seconds_left(500, 7.0)  # resumed
    assert fast.seconds_left(519, 7.19) is None and fast.seconds_left(520, 7.2) == pytest.approx(4.8)
    assert Pace(100).seconds_left(3, 1e6) is None


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (5.4, 90, 3599, 3600 * 25)] == ["5 s", "2 min", "1 h 0 min", "25 h 0 min"]


# ---- where there are bars ----


@pytest.fixture
def bars(monkeypatch):
    """Titles, totals and counts of the bars of a module."""
    shown = []

    def watch(module):
        def bar(total, title, *more, **options):
            made = progress_bar(total, title, *more, **options)
            shown.append((title, total, made))
            return made

        monkeypatch.setattr(module, "progress_bar", bar)
        return shown

    return watch


def test_reading_images(bars, tmp_path):
    for number in range(9):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{number}.png")
    shown = bars(image_files)
    image_files.read_images(image_files.find_images(tmp_path))
    ((title, total, bar),) = shown
    assert (title, total, bar.n) == ("reading images", 9, 9)


def test_encoding_and_drawing(bars):
    shown = bars(batches)
    batches.in_batches(torch.zeros(7, 2), 3, "drawing", lambda part: part)
    ((title, total, bar),) = shown
    assert (title, total, bar.n) == ("drawing", 7, 7)


def test_training_a_feature_network(bars, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(feature_networks, "FEWEST_STEPS", 2)
    data = load_dataset("Digits", "data", train_images=200)
    shown = bars(feature_networks)
    feature_networks.classifier(data, Machine(torch.device("cpu"), bf16=False))
    ((title, total, bar),) = shown
    assert (title, total) == ("training the classifier", 4 * 200) and bar.n == total


def test_no_other_bars():
    """All go through `progress_bar`, so that all are lines in a log file."""
    rooms = ("*.py", *(f"{room}/**/*.py" for room in ("pipeline", "models", "diffusion", "metrics", "scripts")))
    files = {path for room in rooms for path in ROOT.glob(room)}
    users = {path.relative_to(ROOT).as_posix() for path in files if "tqdm(" in path.read_text(encoding="utf-8")}
    assert users == {"progress.py"} and len(files) > 80
    assert loop.progress_bar is image_models.progress_bar is progress.progress_bar
