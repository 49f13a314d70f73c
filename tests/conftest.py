"""The command line run inside the test process, and a small trained run to look at and to damage copies of.

A test must pass on any processor, with any number of threads and in either precision, although all of these round sums
differently, and a neuron near its threshold then fires or does not. So an assertion either holds by construction (a
network, noise or input for which nothing else is possible; a share of random draws within five standard deviations), or
compares two computations on the same machine: of the same shapes bit for bit, of different shapes (another batch size,
fast and reference) in float64, where no rounding is large enough to change a spike, or in numbers that are exact.

Run the suite as different machines before you trust a new test:

    python -m pytest
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest  # of the tests that compute: make test-portable
    OMP_NUM_THREADS=1 python -m pytest
    TEST_PRECISION=float32 python -m pytest  # what --precision auto chooses; or bf16

ONEDNN_MAX_CPU_ISA also takes AVX512_CORE and AVX512_CORE_BF16, where the processor has them.
"""

import shutil
from typing import NamedTuple

import pytest
import torch
from helpers import LIVELY, PRECISION, SMALL, Outcome, call_main, make_image_folder, run_in, write_bars

from pipeline.runtime import device as machine


@pytest.fixture(scope="session", autouse=True)
def precision():
    """Have `--precision auto` choose what TEST_PRECISION says, as on another processor."""
    with pytest.MonkeyPatch.context() as patch:
        if PRECISION:
            patch.setattr(machine, "has_fast_bf16", lambda device: PRECISION[1] == "bf16")
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Caches that begin empty: no test depends on what an earlier program has left in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "TORCH_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp("cache")))
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
    """Options that name a data set of 120 + 4 grey images of 16x16."""
    folder = make_image_folder(tmp_path_factory.mktemp("grey"), 16, colour=False)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 16)


@pytest.fixture(scope="session")
def colour(tmp_path_factory):
    """Options that name a data set of 120 + 4 colour images of 20x20."""
    folder = make_image_folder(tmp_path_factory.mktemp("colour"), 20, colour=True)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 20)


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Options that name a data set of two classes, 60 + 4 grey images of 16x16 each."""
    folder = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("dark blue", "sea")):
        write_bars(folder / "train" / name, 60, 16, colour=False, seed=number)
        write_bars(folder / "test" / name, 4, 16, colour=False, seed=10 + number)
    return ("--dataset_name", "ImageFolder", "--data_path", folder, "--image_size", 16)


@pytest.fixture(scope="session")
def small(grey):
    """Options of a run of two epochs in each stage on grey images, all but the place where it is written."""
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
    return Finished(run_in(result), outcome)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to use and to damage."""
    return shutil.copytree(finished.path, tmp_path / "moved" / "run")
