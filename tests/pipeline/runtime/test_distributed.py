"""Runs of two processes that torchrun starts: they do what one does, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import IMPROVED, LIVELY, ROOT, run_in
from jobs import perform

from models.kernels import compiled
from pipeline.checkpoints import load_checkpoint, load_weights
from pipeline.run_folder import RunFolder

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STOPPED = 20  # steps, of 14 an epoch

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")


def start(*arguments):
    """torchrun with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*TORCHRUN, *map(str, arguments)], **pipes)


def lines_of(text, beginning):
    return [line for line in text.splitlines() if line.startswith(beginning)]


def on_two_machines(folder, *arguments):
    """As if it were two: torchrun twice, with a process each. What the processes print, without torchrun's own words.

    One torchrun may end before the other has said goodbye to it, and the other then complains, although all went well.
    """
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    machines = ("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint)
    started = [start(*machines, "--redirects", 3, "--log_dir", folder, *arguments) for _ in range(2)]
    complaints = [machine.communicate(timeout=120)[1] for machine in started]
    out, err = ("".join(path.read_text() for path in folder.rglob(f"{stream}.log")) for stream in ("stdout", "stderr"))
    assert not any(machine.returncode for machine in started), err + "".join(complaints)
    return out, err


def close(losses, expected, tolerance=1e-9):
    """Whether all losses of all steps are the same."""
    assert len(losses) == len(expected)
    pairs = [(here[name], there[name]) for here, there in zip(losses, expected, strict=True) for name in there]
    return np.allclose(*zip(*pairs, strict=True), rtol=tolerance, atol=0)


def weights_differ_by(one, other):
    """The largest difference of two checkpoints, batch norm's statistics included."""
    one, other = load_weights(one), load_weights(other)
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


class Together(NamedTuple):
    """What one process and two came to: the folder of their runs, the losses of each job by name, what was printed."""

    folder: Path
    alone: dict
    shared: dict
    out: str
    err: str


@pytest.fixture(scope="module")
def together(small, grey, classes, finished, tmp_path_factory):
    """All that two processes do in the tests, but for ends before their time: starting them costs most."""
    folder = tmp_path_factory.mktemp("together")
    shared = (*small, "--no-revive_codes", "--batch_size", 9)  # codes move to images of the first process
    stage = {name: (*shared, "--stage", name) for name in ("vqsvae", "sdid")}
    limited = (*stage["vqsvae"], "--max_minutes", 30)
    brief = ("--code_noise", 0, "--batch_size", 9, "--epochs", 1, "--diffusion_epochs", 1)  # noise is each one's own
    improved = (*classes, *IMPROVED, "--condition", "both", "--held_out", 6, *brief)
    alone_jobs = {
        "stage 1": ((*stage["vqsvae"], "--result_path", folder / "alone"), None),
        "stopped": ((*limited, "--result_path", folder / "stopped alone"), STOPPED),
        "improved": ((*improved, "--result_path", folder / "improved alone"), None),
    }
    alone = dict(zip(alone_jobs, perform(alone_jobs.values()), strict=True))
    shutil.copytree(folder / "alone", folder / "shared stage 2")
    stage_2 = (*stage["sdid"], "--batch_size", 7)  # the last of an epoch has one image, for two processes
    (alone["stage 2"],) = perform([((*stage_2, "--result_path", folder / "alone"), None)])
    for name in ("drawn alone", "drawn shared"):
        shutil.copytree(finished.path, folder / name, ignore=shutil.ignore_patterns("metrics.json", "samples"))
    perform([(("--checkpoint", folder / "drawn alone" / "model.pth", "--num_samples", 5), None)])
    tiny = ("--spike_steps", 4, "--hidden_channels", 4, "--num_samples", 3, "--device", "cpu", "--precision", "float32")
    prior = (*grey, *tiny, "--model", "snn-vae", "--epochs", 1)
    sizes = ("--spike_steps", 4, "--hidden_channels", 8, "--codebook_size", 8, "--embedding_dim", 8)
    sizes = (*sizes, "--downsampling", 2)
    revived = (*classes, *LIVELY, *sizes, "--batch_size", 9, "--epochs", 1, "--ema_decay", 0.999, "--stage", "vqsvae")
    jobs = {
        "stopped": ((*limited, "--result_path", folder / "stopped shared"), STOPPED),
        "resumed": (("--resume", run_in(folder / "stopped alone"), "--stage", "vqsvae"), None),
        "stage 2": ((*stage_2, "--result_path", folder / "shared stage 2"), None),
        "improved": ((*improved, "--result_path", folder / "improved shared"), None),
        "revived": ((*revived, "--result_path", folder / "revived"), None),
        "snn-vae": ((*prior, "--result_path", folder / "prior"), None),
        "drawn": (("--checkpoint", folder / "drawn shared" / "model.pth", "--num_samples", 5), None),
    }
    (folder / "jobs").write_text(json.dumps(list(jobs.values()), default=str))
    script = Path(__file__).with_name("jobs.py")
    printed = on_two_machines(folder / "printed", script, folder / "jobs", folder / "losses")
    shared = dict(zip(jobs, json.loads((folder / "losses").read_text()), strict=True))
    return Together(folder, alone, shared, *printed)


def test_losses_follow_those_of_one_process(together):
    """Of both stages, with batches that two processes cannot share equally."""
    assert close(together.shared["stopped"], together.alone["stage 1"][: len(together.shared["stopped"])])
    assert close(together.shared["stage 2"], together.alone["stage 2"])
    losses = [step["loss"] for step in together.alone["stage 2"]]
    assert sum(loss > 0 for loss in losses) > len(losses) / 2  # at t = T, which a batch of one may draw, it is 0


def test_averaged_weights_are_those_of_one_process(together):
    """Of the improved preset, whose batch norm is calibrated anew. Where dead codes move, both move them alike."""
    assert close(together.shared["improved"], together.alone["improved"])
    for name in ("model.pth", "diff_result/diff_model.pth"):
        pair = (run_in(together.folder / f"improved {kind}") / name for kind in ("alone", "shared"))
        assert weights_differ_by(*pair) < 1e-6
    logs = [RunFolder(run_in(together.folder / f"improved {kind}")).read_log() for kind in ("alone", "shared")]
    alone, shared = ([line["held_out_loss"] for line in log] for log in logs)
    assert len(alone) == 2 and shared == pytest.approx(alone, rel=1e-9)
    assert len(together.shared["revived"]) == 14
    usage = json.loads((run_in(together.folder / "revived") / "log.jsonl").read_text().splitlines()[0])
    assert usage["codebook_usage"] > 0.5


def test_time_that_is_over_in_one_process_stops_all_at_the_same_step(together):
    last = load_checkpoint(run_in(together.folder / "stopped shared") / "last.pth")
    assert len(together.shared["stopped"]) == STOPPED == 14 + last["step"]
    assert together.out.count("--max_minutes 30 reached") == 1


def test_resumed_with_another_number_of_processes(together, tmp_path):
    """One goes on where two stopped, and two where one did; batch norm's statistics are the same, too."""
    copy = shutil.copytree(run_in(together.folder / "stopped shared"), tmp_path / "run")
    (rest,) = perform([(("--resume", copy, "--stage", "vqsvae"), None)])
    whole, model = together.alone["stage 1"], run_in(together.folder / "alone") / "model.pth"
    for losses, run in ((rest, copy), (together.shared["resumed"], run_in(together.folder / "stopped alone"))):
        assert close(losses, whole[STOPPED:], 1e-8)  # AdamW makes more of what rounding leaves of a small gradient
        assert weights_differ_by(run / "model.pth", model) < 1e-6


def test_samples_and_metrics_are_those_of_one_process(together):
    alone, shared = (together.folder / name for name in ("drawn alone", "drawn shared"))
    images, expected = (np.load(run / "samples" / "images.npz")["images"] for run in (shared, alone))
    assert len(images) == 5 and np.array_equal(images, expected)
    assert (shared / "metrics.json").read_text() == (alone / "metrics.json").read_text()


def test_one_process_prints_and_the_prior_is_trained_as_well(together):
    epochs = [line for line in lines_of(together.out, "stage ") if "images/s" in line]
    warnings = lines_of(together.err, "warning: epoch 1: the codebook is collapsing")
    assert len(epochs) == 8 and len(warnings) == len(together.err.splitlines()) <= 1
    assert together.out.count("stopped, saving") == 1
    assert together.out.count("(vae)") == 1 and together.out.count("the run is in") == 6
    assert len(np.load(run_in(together.folder / "prior", "snn-vae") / "samples" / "images.npz")["images"]) == 3
    reports = [path.read_text(encoding="utf-8") for path in together.folder.rglob("report.html")]
    assert len(reports) == 9 and not any("could not be drawn" in report for report in reports)


# ---- ends before their time ----


def test_a_mistake_is_said_once():
    process = start("--nproc_per_node", 2, ROOT / "main.py", "--dataset_name", "MNSIT")
    out, err = process.communicate(timeout=60)
    assert process.returncode and not out
    assert len(lines_of(err, "error: ")) == 1 and "MNSIT" in err and "exitcode  : 2" in err


def workers_of(process):
    """Process numbers of the two that torchrun has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    texts = {int(child): Path(f"/proc/{child}/environ").read_text() for child in children}
    environments = {pid: dict(line.partition("=")[::2] for line in text.split("\0")) for pid, text in texts.items()}
    return {int(names["RANK"]): pid for pid, names in environments.items()}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes as on Linux")
@pytest.mark.parametrize("fault", ["killed", "terminated"])
def test_the_end_of_one_is_the_end_of_all(fault, small, cli, tmp_path):
    """A killed process ends the run with a message; SIGTERM saves the step at which all are. Both can be resumed."""
    run = run_in(tmp_path)
    forever = ("--epochs", 10**6, "--save_every", 1e-9 if fault == "killed" else 60)
    process = start("--nproc_per_node", 2, ROOT / "main.py", *small, *forever, "--result_path", tmp_path)
    began = time.monotonic()
    while not (run / "log.jsonl").exists() and time.monotonic() < began + 60:
        time.sleep(0.1)
    if fault == "killed":
        os.kill(workers_of(process)[1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    expected = {"killed": "error: another process of the run has died", "terminated": "terminated: saved; resume with"}
    assert process.returncode and len(lines_of(err, expected[fault])) == 1, err
    epochs = load_checkpoint(run / "last.pth")["epoch"] + 1
    resumed = cli("--resume", run, "--epochs", epochs, "--stage", "vqsvae")
    assert (resumed.status, resumed.err) == (0, "")
    assert [line["epoch"] for line in RunFolder(run).read_log()] == list(range(1, epochs + 1))
