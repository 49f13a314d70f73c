"""The command line run inside the test process, and a small trained run to look at and to damage copies of.

A test must pass on any processor, with any number of threads and in either precision, although all of these round sums
differently, and a neuron near its threshold then fires or does not. So an assertion either holds by construction (a
network, noise or input for which nothing else is possible; a share of random draws within five standard deviations), or
compares two computations on the same machine: of the same shapes bit for bit, of different shapes (another batch size,
fast and plain) in float64, where no rounding is large enough to change a spike, or in numbers that are exact.

Run the suite as different machines before you trust a new test:

    python -m pytest
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest  # of the tests that compute: make test-portable
    OMP_NUM_THREADS=1 python -m pytest
    TEST_PRECISION=float32 python -m pytest  # what --precision auto chooses; or bf16

ONEDNN_MAX_CPU_ISA also takes AVX512_CORE and AVX512_CORE_BF16, where the processor has them.
"""

import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import main
from pipeline.runtime import device as machine

SMALL = (
    *("--spike_steps", 4, "--hidden_channels", 8, "--denoiser_channels", 4, "--codebook_size", 8, "--embedding_dim", 8),
    *("--batch_size", 4, "--lr", 0.03, "--num_samples", 5, "--device", "cpu", "--precision", "float32"),
)
"""Options of networks that learn something in a second."""

LIVELY = ("--revive_codes", "--clipped_error")
"""Options of snn-vq-vae with which even these use many codes, so that no two samples are alike."""

PRECISION = ("--precision", os.environ["TEST_PRECISION"]) if "TEST_PRECISION" in os.environ else ()
"""Options for programs that a test starts as processes of their own; within this one, `precision` does it."""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def call_main(*arguments, report=False):
    """The command line in this process; a report is left out unless it is asked for, since it takes half a second."""
    arguments = arguments if report else (*arguments, "--no-report")
    out, err, status = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on networks this small, threads only wait for each other
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        finally:
            torch.set_num_threads(threads)
    return Outcome(status, out.getvalue(), err.getvalue())


def interrupt(*_):
    """In the place of some function: Ctrl-C while it runs."""
    raise KeyboardInterrupt


def write_pictures(folder, count, size, colour, seed):
    """Bright bars on black, a different one in each picture."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.zeros((size, size, 3) if colour else (size, size), np.uint8)
        left = generator.integers(size - 4)
        pixels[:, left : left + 4] = generator.integers(100, 256, 3 if colour else 1)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def make_image_folder(path, size, colour):
    write_pictures(path / "train", 120, size, colour, seed=1)
    write_pictures(path / "test", 4, size, colour, seed=2)
    return path


@pytest.fixture(scope="session", autouse=True)
def precision():
    """Have `--precision auto` choose what TEST_PRECISION says, as on another processor."""
    with pytest.MonkeyPatch.context() as patch:
        if PRECISION:
            patch.setattr(machine, "has_fast_bf16", lambda device: PRECISION[1] == "bf16")
        yield


@pytest.fixture
def float64():
    """Networks made or loaded during the test compute in float64, whose rounding changes no spike."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def cli():
    """The command line as a function: arguments to exit status, stdout and stderr."""
    return call_main


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """Options that name a data set of 120 + 4 grey pictures of 16x16."""
    folder = make_image_folder(tmp_path_factory.mktemp("grey"), 16, colour=False)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 16)


@pytest.fixture(scope="session")
def colour(tmp_path_factory):
    """Options that name a data set of 120 + 4 colour pictures of 20x20."""
    folder = make_image_folder(tmp_path_factory.mktemp("colour"), 20, colour=True)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 20)


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Options that name a data set of two classes, 60 + 4 grey pictures of 16x16 each."""
    folder = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("dark blue", "sea")):
        write_pictures(folder / "train" / name, 60, 16, colour=False, seed=number)
        write_pictures(folder / "test" / name, 4, 16, colour=False, seed=10 + number)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 16)


@pytest.fixture(scope="session")
def small(grey):
    """Options of a run of two epochs in each stage on grey pictures, all but the place where it is written."""
    return (*grey, *SMALL, *LIVELY, "--epochs", 2, "--diffusion_epochs", 2)


class Finished(NamedTuple):
    path: object
    outcome: Outcome


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A run of `small` from beginning to end: its folder, which no test may change, and what was printed."""
    result = tmp_path_factory.mktemp("finished")
    outcome = call_main(*small, "--result_path", result, report=True)
    assert outcome.status == 0, outcome.err
    return Finished(result / "ImageFolder" / "snn-vq-vae", outcome)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to use and to damage."""
    return shutil.copytree(finished.path, tmp_path / "moved" / "run")
