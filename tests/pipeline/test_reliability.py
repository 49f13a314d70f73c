"""Runs that are killed, stopped, damaged, starved of disk or fed nonsense: what they leave, and how they go on."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same_run, interrupt, read_log, run_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import files
import main
from datasets import load_dataset
from errors import UserError
from pipeline import checkpoints, run_folder, stages
from pipeline.checkpoints import load_checkpoint, load_weights, save_weights
from pipeline.evaluation import cache
from pipeline.options.sections import DECLARATIONS
from pipeline.run_folder import RunFolder
from pipeline.training import loop as training
from pipeline.training import objectives as trainers
from pipeline.training.interruption import SIGNALS, Interrupted, Interruption

ROUNDS = Path(__file__).with_name("rounds.py")
STEPS = 30  # of an epoch of `small`
SAVE_EACH_STEP = ("--save_every", 1e-9)
SAVE_OFTEN = ("--save_every", 0.1 / 60)


def flip(path, bit):
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def assert_whole(run):
    """Whatever a killed process leaves under its final name can be read."""
    for path in run.rglob("*"):
        if path.suffix == ".pth":
            load_checkpoint(path)
        elif path.suffix == ".png":
            np.asarray(Image.open(path))
        elif path.name in ("config.json", "metrics.json"):
            json.loads(path.read_text())
    RunFolder(run).read_log()


def patch_step(patch, step, fault):
    """Have `fault(trainer, losses)` happen within the training step of this number; it returns the losses."""
    steps, take = iter(range(1, 10**6)), training.Trainer._step

    def faulty(trainer, *arguments):
        losses = take(trainer, *arguments)
        return fault(trainer, losses) if next(steps) == step else losses

    patch.setattr(training.Trainer, "_step", faulty)


# ---- processes that are killed ----


def work(arguments, output, sabotage):
    """The command line in a process of its own."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sabotage()
    main.main([str(argument) for argument in arguments])


def nothing():
    pass


class DieWriting:
    """Kills the process when it has the disk synchronise for the n-th time, and half of a file is written."""

    def __init__(self, number):
        self.number = number

    def __call__(self):
        syncs, sync = itertools.count(1), os.fsync

        def die(descriptor):
            if next(syncs) == self.number:
                state = os.fstat(descriptor)
                if stat.S_ISREG(state.st_mode):
                    os.truncate(descriptor, state.st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = die


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts the command line in a process forked from one that has imported everything, which saves seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reliability"])
    output = tmp_path_factory.mktemp("output") / "output"

    def begin(arguments, sabotage=nothing):
        process = context.Process(target=work, args=(arguments, output, sabotage))
        process.start()
        return process, output

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        begin(("--help",))[0].join()
        yield begin


def go_on(small, result, *more):
    """The arguments that begin the run or go on with it."""
    run = run_in(result)
    return ("--resume", run, *more) if (run / "config.json").exists() else (*small, "--result_path", result, *more)


def test_killed_at_ten_random_moments(finished, small, tmp_path, start):
    moments, kills, attempts = np.random.default_rng(0), 0, 0
    while kills < 10:
        result = tmp_path / str(attempts)
        process, output = start(go_on(small, result, *SAVE_OFTEN))
        process.join(moments.uniform(0.1, 1.2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            assert_whole(run_in(result))
        else:
            assert process.exitcode == 0, output.read_text()
            assert_same_run(finished.path, run_in(result))
            attempts += 1
    process, output = start(go_on(small, result))
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert_same_run(finished.path, run_in(result))


def test_killed_within_each_kind_of_write(finished, small, tmp_path, start):
    exits = []
    for number in itertools.count(1, 2):
        process, output = start(go_on(small, tmp_path), DieWriting(number))
        process.join()
        exits.append(process.exitcode)
        if exits[-1] != -signal.SIGKILL:
            break
        assert_whole(run_in(tmp_path))
    assert exits[-1] == 0 and len(exits) > 5, (exits, output.read_text())
    assert_same_run(finished.path, run_in(tmp_path))
    assert not list(tmp_path.rglob("*.part"))


def test_terminated_from_outside(finished, small, tmp_path, start):
    run = run_in(tmp_path)
    process, output = start((*small, "--result_path", tmp_path))
    while not run_folder.RunFolder(run).last.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert output.read_text().splitlines()[-1] == f"terminated: saved; resume with: python -u main.py --resume {run}"
    process, output = start(("--resume", run))
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert_same_run(finished.path, run)


def hold(path, ready):
    folder = RunFolder(path)
    folder.lock()
    ready.set()
    time.sleep(60)


def test_two_processes_in_one_folder(cli, run, start):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    first = context.Process(target=hold, args=(run, ready))
    first.start()
    assert ready.wait(30)
    for second in (("--resume", run), ("--checkpoint", run / "model.pth")):
        outcome = cli(*second)
        assert outcome.status == 2 and f"another process is using {run}" in outcome.err
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (run / ".lock").exists()
    assert cli("--resume", run).status == 0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(number, monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        with RunFolder(tmp_path) as run:
            run.lock()


def test_the_lock_is_let_go_last(monkeypatch, tmp_path):
    """After the curves are closed, and also where that fails."""
    order, release = [], run_folder.FileLock.release

    def close(*_):
        order.append("curves")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "close", close)
    monkeypatch.setattr(run_folder.FileLock, "release", lambda *a, **b: order.append("lock") or release(*a, **b))
    with pytest.raises(UserError, match="No space left"), RunFolder(tmp_path) as run:
        run.lock()
        for stage in ("vqsvae", "sdid"):
            run.log(stage, 1, {"loss": 1.0, "images": 1, "images_per_second": 1.0})
    assert order == ["curves", "curves", "lock"]
    with RunFolder(tmp_path) as run:
        run.lock()


def test_importing_needs_no_module_of_unix_alone():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios')))"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}; import main, pipeline.program"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_synchronised(monkeypatch, tmp_path):
    """As on Windows, where a folder cannot even be opened."""
    real = os.open

    def refuse(path, *more, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(files.os, "open", refuse)
    checkpoints.write_json(tmp_path / "new" / "file.json", [1])
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == [1]


def test_stage_2_begun_anew_and_stopped_early(cli, small, run, tmp_path, monkeypatch):
    """What an earlier training has saved is not gone on with, and its autoencoder stays."""
    target = shutil.copytree(run, run_in(tmp_path / "result"))
    shutil.rmtree(target / "diff_result")
    before = (target / "model.pth").read_bytes()
    with monkeypatch.context() as patch:
        patch_step(patch, 3, interrupt)
        outcome = cli(*small, "--stage", "sdid", "--lr", 0.02, "--result_path", tmp_path / "result")
    assert outcome.status == 130
    assert cli("--resume", target, "--stage", "all").status == 0
    assert (target / "model.pth").read_bytes() == before
    losses = [line["loss"] for line in read_log(target) if line["stage"] == "sdid"]
    assert len(losses) == 2 and losses != [line["loss"] for line in read_log(run) if line["stage"] == "sdid"]


# ---- signals ----


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is not ignored, as it is where a script has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, STEPS - 20), (signal.SIGTERM, STEPS), (signal.SIGTERM, 2 * STEPS + 7)]
)
def test_a_signal_saves_at_once(number, step, cli, small, finished, tmp_path, monkeypatch):
    def raise_signal(_, losses):
        os.kill(os.getpid(), number)
        return losses

    run = run_in(tmp_path)
    with monkeypatch.context() as patch:
        patch_step(patch, step, raise_signal)
        outcome = cli(*small, "--result_path", tmp_path)
    assert outcome.status == 128 + number
    assert outcome.err == f"{SIGNALS[number]}: saved; resume with: python -u main.py --resume {run}\n"
    state = load_checkpoint(run / "last.pth")
    before = 2 * STEPS if state["stage"] == "sdid" else 0
    assert before + state["epoch"] * STEPS + state["step"] == step, "not a step is lost or done after the signal"
    assert cli("--resume", run).status == 0
    assert_same_run(finished.path, run)


def test_a_signal_during_the_agreement_waits_for_the_next(cli, small, tmp_path, monkeypatch):
    """The other processes would go on: one may only act upon what all have agreed."""
    calls, agree = iter(range(1, 10**6)), training.processes.most

    def interrupted(*numbers):
        agreed = agree(*numbers)
        if len(numbers) > 1 and next(calls) == 7:  # one number alone is a barrier
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(training.processes, "most", interrupted)
    assert cli(*small, "--result_path", tmp_path).status == 128 + signal.SIGTERM
    assert load_checkpoint(run_in(tmp_path) / "last.pth")["step"] == 8


def piped(arguments, reader, redirection=""):
    """The command line in a shell, its output piped to a program that ends: status and stderr."""
    words = shlex.join([sys.executable, "-u", str(ROOT / "main.py"), *map(str, arguments), "--no-report"])
    command = f"{words} {redirection} | {reader}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_nobody_reads_the_output_any_more(redirection, finished, small, cli, tmp_path):
    """The training saves, and says on stderr, where that is read, how to resume; that gives the same run."""
    status, err = piped((*small, "--result_path", tmp_path), "head -1 > /dev/null", redirection)
    line = f"the output is closed: saved; resume with: python -u main.py --resume {run_in(tmp_path)}\n"
    assert (status, err) == (141, "" if redirection else line)
    assert (run_in(tmp_path) / "last.pth").exists() and not (run_in(tmp_path) / "metrics.json").exists()
    assert cli("--resume", run_in(tmp_path)).status == 0
    assert_same_run(finished.path, run_in(tmp_path))


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-"])
def test_a_stream_that_is_closed_from_the_start(closed, finished, small, tmp_path):
    """No file that is opened later takes its place."""
    assert piped((*small, "--result_path", tmp_path), "cat > /dev/null", closed) == (0, "")
    assert_same_run(finished.path, run_in(tmp_path))


def test_an_evaluation_whose_output_is_closed(run):
    status, err = piped(("--checkpoint", run, "--metrics", "mse"), "true")
    assert (status, err) == (141, "the output is closed: run the same command again\n")


def test_a_second_signal_acts_at_once(cli, small, tmp_path, monkeypatch):
    def raise_signals(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)  # the first is handled
        os.kill(os.getpid(), signal.SIGINT)

    patch_step(monkeypatch, 7, raise_signals)
    outcome = cli(*small, "--result_path", tmp_path)
    assert outcome.status == 130
    assert outcome.err == "interrupted: nothing was saved, run the same command again\n"
    assert not (run_in(tmp_path) / "last.pth").exists()
    assert cli(*small, "--result_path", tmp_path, "--stage", "vqsvae").status == 0


def test_ctrl_c_advises_what_works(cli, small, run, tmp_path, monkeypatch):
    """To resume only where this call trains and has saved; an evaluation is run again."""
    again = "interrupted: run the same command again\n"
    shutil.rmtree(run / "samples")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sampling.image_models.CodeDiffusion.draw_images", interrupt)
        evaluates = ("--checkpoint", run, "--num_samples", 2)
        for call in (evaluates, (*small, "--stage", "evaluate", "--result_path", run.parents[1])):
            shutil.copytree(run, run_in(run.parents[1]), dirs_exist_ok=True)
            outcome = cli(*call)
            assert (outcome.status, outcome.err) == (130, again)
        (run / "last.pth").unlink()
        assert cli(*evaluates).err == again  # a packed run
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", interrupt)
        outcome = cli(*small, "--result_path", tmp_path / "new")
    command = f"resume with: python -u main.py --resume {run_in(tmp_path / 'new')}"
    assert (outcome.status, outcome.err) == (130, f"interrupted: {command}\n")
    assert cli("--resume", run_in(tmp_path / "new")).status == 0


def test_signals_are_handled_as_before_outside_training(cli, finished):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Interrupted), Interruption("") as interruption:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in SIGNALS] == before, "the second one acts"
    with Interruption(""):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background jobs
    try:
        with Interruption("") as interruption:
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- disks that are full, or lose power ----


@pytest.fixture(scope="module")
def longer(cli, finished, tmp_path_factory):
    """The finished run with one more epoch."""
    run = shutil.copytree(finished.path, tmp_path_factory.mktemp("longer") / "run")
    assert cli("--resume", run, "--diffusion_epochs", 3).status == 0
    return run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "last.pth", "diff_result/diff_model.pth", "metrics.json"])
def test_full_disk(name, cli, longer, run, monkeypatch):
    before = (run / name).read_bytes()
    part = run / f"{name}.01234567.part"
    part.symlink_to("/dev/full")  # every write there fails as on a full disk
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_parts", lambda *_: None)
        patch.setattr(files, "part_of", lambda path: path.with_name(f"{path.name}.01234567.part"))
        outcome = cli("--resume", run, "--diffusion_epochs", 3)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"cannot write {run / name} (No space left on device)" in outcome.err
    assert (run / name).read_bytes() == before and not part.is_symlink(), "what there is stays, the rest makes room"
    assert cli("--resume", run, "--diffusion_epochs", 3).status == 0
    assert_same_run(longer, run)


class Disk:
    """What a disk holds after a power loss: contents as of the last fsync, under names as of that of their folder."""

    def __init__(self):
        self.contents, self.folders, self.sync = {}, {}, os.fsync

    def fsync(self, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file()]
            self.folders[path] = {file.name: self.contents.get(file.stat().st_ino, b"") for file in files}
        else:
            self.contents[os.fstat(descriptor).st_ino] = path.read_bytes()

    def lose_power(self, run):
        shutil.rmtree(run)
        self.contents.clear()
        for folder, kept in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in kept.items():
                (folder / name).write_bytes(content)
                self.contents[(folder / name).stat().st_ino] = content


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc on this system")
def test_power_loss(cli, small, finished, tmp_path, monkeypatch):
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    for step in (STEPS + 5, STEPS, STEPS // 2, 1):
        with monkeypatch.context() as patch:
            patch_step(patch, step, interrupt)
            assert cli(*go_on(small, tmp_path, *SAVE_EACH_STEP)).status == 130
        disk.lose_power(run_in(tmp_path))
        assert_whole(run_in(tmp_path))
    assert cli("--resume", run_in(tmp_path)).status == 0
    disk.lose_power(run_in(tmp_path))
    assert_same_run(finished.path, run_in(tmp_path))


# ---- files that are damaged, foreign or malicious ----


def test_every_damaged_bit_of_a_checkpoint_is_noticed_or_harmless(tmp_path):
    path, good = tmp_path / "model.pth", {"weight": torch.arange(60.0), "steps": torch.tensor(3)}
    save_weights(path, good)
    whole = path.read_bytes()
    noticed = 0
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=400):
        path.write_bytes(whole)
        flip(path, bit)
        try:
            weights = load_weights(path)
        except UserError as error:
            assert str(path) in str(error) and "damaged" in str(error)
            noticed += 1
        else:
            assert weights.keys() == good.keys() and all(torch.equal(weights[key], good[key]) for key in good), bit
    assert noticed > 100
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short"):
            load_weights(path)


@pytest.mark.parametrize("name", ["last.pth", "model.pth", "diff_result/diff_model.pth"])
def test_a_damaged_checkpoint_is_not_used(name, cli, run):
    weights = load_checkpoint(run / name)
    vectors = (value for value in weights.get("model", weights).values() if value.dim() == 1)
    vector = next(value for value in vectors if len(value.unique()) > 1)
    flip(run / name, 8 * (run / name).read_bytes().index(vector.numpy().tobytes()))
    before = [path.read_bytes() for path in sorted(run.glob("**/*.pth"))]
    arguments = ("--resume", run) if name == "last.pth" else ("--checkpoint", run / "model.pth")
    outcome = cli(*arguments)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert str(run / name) in outcome.err and "restore a copy" in outcome.err
    assert before == [path.read_bytes() for path in sorted(run.glob("**/*.pth"))]


def test_a_damaged_log_is_found_before_training(cli, run):
    (run / "log.jsonl").write_text('{"stage": "vqs')
    outcome = cli("--resume", run, "--diffusion_epochs", 3)
    assert outcome.status == 2 and f"{run / 'log.jsonl'} cannot be read" in outcome.err


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrap", [torch.save, pickle.dump], ids=["archive", "pickle"])
def test_code_in_a_checkpoint_is_not_run(wrap, cli, run):
    target = run / "target"
    for path, arguments in {"model.pth": ("--checkpoint", run / "model.pth"), "last.pth": ("--resume", run)}.items():
        with (run / path).open("wb") as file:
            wrap({"stage": "sdid", "model": Bomb(target)}, file)
        outcome = cli(*arguments)
        assert outcome.status == 2 and str(run / path) in outcome.err and not target.exists()


def test_code_in_a_cached_file_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = files.cache_folder() / "statistics.npz"
    path.parent.mkdir()
    target = tmp_path / "target"
    np.savez(path, names=np.array(["mean"]), mean=np.array([Bomb(target)], dtype=object))
    assert cache.cached("statistics", lambda: {"mean": np.ones(1)}) == {"mean": 1}
    assert f"{path} is damaged" in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "has version 2, this program reads version 3"),
        ({"version": None, "run": None}, "has version None"),
        ({"dataset_name": "FMNIST"}, "--dataset_name FMNIST, not ImageFolder"),
        ({"codebook_size": 64, "seed": 1}, "--seed 1, not 42, --codebook_size 64, not 8"),
    ],
)
def test_a_checkpoint_of_another_run_names_the_difference(change, expected, cli, run):
    state = load_checkpoint(run / "last.pth")
    save_weights(
        run / "last.pth", {**state, "run": {**state["run"], **change}, **(change if "version" in change else {})}
    )
    outcome = cli("--resume", run)
    assert outcome.status == 2 and expected in outcome.err and str(run / "last.pth") in outcome.err


def wrapped(weights, way):
    """A state dict as other programs save it."""
    if way in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        return {way + name: value for name, value in weights.items()}
    if way == "_orig_mod. within":
        return {name.replace(".", "._orig_mod.", 1): value for name, value in weights.items()}
    return {"epoch": 3, way: {f"module.{name}": value for name, value in weights.items()}, "args": {"lr": 0.1}}


PREFIXED = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod. within")


@pytest.mark.parametrize("way", [*PREFIXED, "state_dict", "model_state_dict", "model"])
def test_weights_in_the_wrapping_of_other_programs(way, cli, run):
    expected, before = load_weights(run / "model.pth"), json.loads((run / "metrics.json").read_text())
    for name in ("model.pth", "diff_result/diff_model.pth"):
        torch.save(wrapped(load_weights(run / name), way), run / name)
    found = load_weights(run / "model.pth")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    if way in ("module.", "model"):
        outcome = cli("--checkpoint", run, "--num_samples", 5)
        assert (outcome.status, outcome.err) == (0, "")
        assert json.loads((run / "metrics.json").read_text()) == before, "the weights are the same"


@pytest.mark.parametrize("content", [{"a": 3}, {"state_dict": {"a": "text"}}, {3: torch.ones(1)}])
def test_a_file_without_weights(content, cli, run):
    torch.save(content, run / "model.pth")
    outcome = cli("--checkpoint", run / "model.pth")
    assert outcome.status == 2 and f"{run / 'model.pth'} does not hold the weights" in outcome.err


def test_what_resume_reads_is_no_checkpoint(cli, run):
    """Its weights are those of the last step, not those that are kept."""
    outcome = cli("--checkpoint", run / "last.pth")
    assert outcome.status == 2 and "name the model.pth beside it" in outcome.err


def test_curves_do_not_double(cli, small, finished, tmp_path, monkeypatch):
    """Killed twice after an epoch was shown and before it was saved, once in each stage: TensorBoard has it once."""
    run, save = run_in(tmp_path), training.Trainer.save
    for epochs_saved in (1, 2):  # of those of this call

        def fail(trainer, calls=iter(range(epochs_saved, -1, -1))):  # noqa: B008
            if not next(calls):
                raise KeyboardInterrupt
            save(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "save", fail)
            assert cli(*go_on(small, tmp_path)).status == 130
    assert cli("--resume", run).status == 0
    assert_same_run(finished.path, run)
    for stage, tag in (("vqsvae", "reconstructions"), ("sdid", "samples")):
        events = EventAccumulator(str(run / "tensorboard" / stage)).Reload()
        losses = [(line["epoch"], line["loss"]) for line in read_log(run) if line["stage"] == stage]
        shown = [(event.step, event.value) for event in events.Scalars(f"{stage}/loss")]
        assert shown == [(epoch, pytest.approx(loss)) for epoch, loss in losses]
        assert [event.step for event in events.Images(tag)] == [1, 2]


def test_a_log_has_each_epoch_once(cli, small, finished, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "save", fail)  # killed between the log and the checkpoint
        assert cli(*small, "--result_path", tmp_path).status == 130
    assert len(read_log(run_in(tmp_path))) == 1
    assert cli("--resume", run_in(tmp_path)).status == 0
    assert_same_run(finished.path, run_in(tmp_path))


def test_killed_between_the_last_checkpoint_of_a_stage_and_its_weights(cli, small, finished, tmp_path, monkeypatch):
    calls = itertools.count(1)

    def fail(path, content):
        if next(calls) == 2:  # after the second epoch of two
            raise KeyboardInterrupt
        save_weights(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_weights", fail)
        assert cli(*small, "--result_path", tmp_path).status == 130
    assert load_checkpoint(run_in(tmp_path) / "last.pth")["epoch"] == 2
    assert cli("--resume", run_in(tmp_path)).status == 0
    assert_same_run(finished.path, run_in(tmp_path))


# ---- numbers that are none ----


def spoil_loss(value):
    return lambda _, losses: {**losses, "loss": torch.tensor(value)}


def spoil_weight(trainer, losses):
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = torch.inf
    return losses


@pytest.mark.parametrize(
    ("step", "fault", "expected"),
    [
        (STEPS + 3, spoil_loss(torch.nan), "epoch 2/2, step 3: loss is nan"),
        (3 * STEPS, spoil_loss(torch.inf), "epoch 1/2, step 30: loss is inf"),
        (2 * STEPS, spoil_weight, "epoch 2/2, step 30: encoder.snn_convs.0.weight is inf"),
    ],
)
def test_numbers_that_are_none_stop_before_they_are_saved(
    step, fault, expected, cli, small, finished, tmp_path, monkeypatch
):
    run = run_in(tmp_path)
    with monkeypatch.context() as patch:
        patch_step(patch, step, fault)
        outcome = cli(*small, "--result_path", tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert expected in outcome.err and f"{run / 'last.pth'} is the last good" in outcome.err and "--lr" in outcome.err
    for path in run.rglob("*.pth"):
        weights = load_checkpoint(path)
        assert all(value.isfinite().all() for value in weights.get("model", weights).values()), path
    assert cli("--resume", run).status == 0
    assert_same_run(finished.path, run)


@pytest.mark.parametrize(("every", "options", "step"), [(1, (), 3), (50, (), 50), (50, SAVE_EACH_STEP, 3)])
def test_a_device_is_asked_for_the_loss_now_and_then_and_before_saving(
    every, options, step, cli, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "STEPS_BETWEEN_CHECKS", {"cpu": every})
    patch_step(monkeypatch, 3, spoil_loss(torch.nan))
    outcome = cli(*small, "--result_path", tmp_path, "--batch_size", 2, *options)
    assert outcome.status == 2 and f"step {step}: loss is nan" in outcome.err


@pytest.mark.parametrize(("size", "share"), [(64, "1.6%"), (8, "12.5%")])
def test_a_collapsing_codebook_is_warned_about(size, share, cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "encode_images", lambda _, images, __: torch.zeros(len(images), 4, 4))
    monkeypatch.setattr(trainers, "usage", lambda codes, size: 1 / size)
    options = ("--codebook_size", size, "--epochs", 1, "--stage", "vqsvae")
    outcome = cli(*small, *options, "--result_path", tmp_path)
    assert outcome.status == 0 and outcome.err.count("\n") == 1
    assert f"warning: epoch 1: the codebook is collapsing: only {share} of its codes" in outcome.err
    assert read_log(run_in(tmp_path))[0]["codebook_usage"] == 1 / size


# ---- nonsense ----

BOUNDED = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
OPTIONS = [f"--{name}" for name in DECLARATIONS]
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["-1", "0", "1e999", "9" * 300, "a" * 300, "digits", "snn-vae", "all"]),
)


@BOUNDED
@given(words=st.lists(st.one_of(st.sampled_from(OPTIONS), WORDS), max_size=6))
def test_options_are_taken_or_refused_in_one_line(words, tmp_path):
    """`words` in the place of a command line; nothing is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("pipeline.program.execute", nothing_to_do)
        error = io.StringIO()
        patch.setattr("sys.stderr", error)
        patch.setattr("sys.stdout", io.StringIO())
        try:
            main.main(words)
        except SystemExit as exit_:
            assert exit_.code == 2 or {"-h", "--help"} & set(words)
            assert error.getvalue().count("\n") == (exit_.code == 2)
        else:
            assert error.getvalue() == ""
    assert not list(tmp_path.iterdir())


def nothing_to_do(_):
    pass


def whole_file(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


GOOD = {
    "checkpoint": whole_file(lambda file: torch.save({"weight": torch.ones(3)}, file)),
    "statistics": whole_file(lambda file: np.savez(file, names=np.array(["mean"]), mean=np.ones(3))),
    "image": whole_file(lambda file: Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(file, "PNG")),
    "options": b'{"epochs": 3, "seed": 42}',
}


def read_an_image(path):
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(path.with_name("good.png"))
    return load_dataset("ImageFolder", path.parent, image_size=16)


def read_statistics(path):
    arrays = files.from_cache(path, cache._read)
    assert arrays is None or (list(arrays) == ["mean"] and arrays["mean"].tolist() == [1, 1, 1])


READERS = {
    "checkpoint": ("model.pth", load_weights),
    "statistics": ("statistics.npz", read_statistics),
    "image": ("image.png", read_an_image),
    "options": ("config.json", lambda path: RunFolder(path.parent).read_config()),
}


@pytest.mark.parametrize("kind", GOOD)
@BOUNDED
@given(data=st.data())
def test_bytes_are_read_or_refused(kind, data, tmp_path):
    """Any bytes, or a good file with some bytes replaced."""
    good = GOOD[kind]
    if data.draw(st.booleans()):
        start, replaced = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 20))
        content = good[:start] + data.draw(st.binary(max_size=20)) + good[start + replaced :]
    else:
        content = data.draw(st.binary(max_size=200))
    name, read = READERS[kind]
    (tmp_path / name).write_bytes(content)
    try:
        read(tmp_path / name)
    except UserError as error:
        assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    "options",
    [
        ("--batch_size", 10**30),
        ("--eval_batch_size", 10**30),
        ("--epochs", 10**30),
        ("--held_out", 120),
        ("--held_out", -1),
        ("--save_every", 0),
        ("--save_every", -3),
        ("--result_path", "x" * 300),
        ("--data_path", "x" * 300),
    ],
)
def test_absurd_values_are_one_line(options, cli, small, tmp_path):
    outcome = cli(*small, "--result_path", tmp_path, *options)
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_must_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(UserError, match=f"cannot read folder {tmp_path} .Permission denied"):
        load_dataset("ImageFolder", tmp_path)


def test_images_of_any_shape(tmp_path):
    for i, shape in enumerate([(1, 1), (1, 3000), (3000, 1), (17, 5)]):
        Image.fromarray(np.full(shape, 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert load_dataset("ImageFolder", tmp_path, image_size=8).train.shape == (3, 1, 8, 8)


# ---- many runs ----


def test_runs_in_a_loop_leak_nothing():
    """In a process of its own, whose memory no other test has left in pieces; caches are full after seven rounds."""
    done = subprocess.run([sys.executable, ROUNDS], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    for name in ("files", "threads", "processes"):
        assert rounds[-1][name] <= rounds[1][name], name
    growths = [after["memory"] - before["memory"] for before, after in itertools.pairwise(rounds)]
    assert min(growths[-3:]) < 2 * 2**20, "bytes in each of the last three"
