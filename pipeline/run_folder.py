"""A run folder: where a run's files are, how they are written whole, and how they are read back.

config.json                    resolved options, image shape, versions, git commit
model.pth                      autoencoder, plain state dict
diff_result/diff_model.pth     denoiser, plain state dict
last.pth                       what --resume needs: stage, epoch, step, weights, optimizer, and what run it is of
log.jsonl, TensorBoard files   training curves
samples/                       pictures and images.npz
metrics.json                   figures, each with its protocol
.lock                          held by the process that works here

Of several processes at one run, one writes; in the others all that writes does nothing.
"""

import fcntl
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from errors import UserError
from pipeline.distributed import by_writer

PACKAGES = (
    *("torch", "torchvision", "spikingjelly", "numpy", "scipy", "scikit-learn", "pillow"),
    *("torchmetrics", "pytorch-fid"),
)
"""What training and metrics depend on; their versions are recorded."""

LAST_VERSION = 2
"""Of what last.pth holds: counts up when a program could misread the file of another."""

IDENTITY = (
    *("preset", "dataset_name", "image_size", "channels", "model"),
    *("codebook_size", "embedding_dim", "spike_steps", "hidden_channels", "downsampling", "spike_generator"),
    *("denoiser", "denoiser_spike_steps"),
)
"""Options that whoever uses a run's autoencoder must share with it."""

NETWORKS = (
    *(*IDENTITY, "readout", "train_images", "held_out"),
    *("revive_codes", "clipped_error", "denoiser_channels", "denoiser_blocks", "images_per_prototype"),
)
"""Options that a training which begins with a run's networks takes over from it."""

UNCHANGEABLE = (
    *(*NETWORKS, "start_from", "batch_size", "lr", "diffusion_lr", "lr_schedule", "ema_decay"),
    *("fixed_norm", "loss", "seed"),
)
"""Options that a resumed training must share with its beginning."""


def as_written(value: Any) -> Any:
    """An option's value as config.json holds it."""
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Context in which a failure to write is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make room there or choose another place") from error


@by_writer
def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader never meets half of it. Raises UserError.

    When this returns the file is on the disk: a power loss afterwards leaves it, one before leaves the file of before.
    """
    fresh = path.with_name(path.name + ".part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)  # the disk may be full
            raise
        _sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people and programs, whole."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the names of the files there."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)


def save_weights(path: Path, content: Any) -> None:
    """Write a state dict, or a dict that holds some, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_weights(path: Path) -> dict[str, Any]:
    """Read what `save_weights` wrote, onto the CPU and without running code from the file.

    Raises UserError if the file is missing or unreadable, or if a checksum in it shows that a bit has changed.
    """
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {wrong}: train first, or name a file of weights that a run has written")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign or damaged bytes fail in any way while they are unpickled
        cause = f"{path} is no checkpoint that can be read ({type(error).__name__})"
        raise UserError(f"{cause}: it is damaged, cut short or another file; put back a copy, or train anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _check_sums(path: Path) -> None:
    """Raise BadZipFile where a checksum does not fit: torch.load reads the archive without looking at them."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format of PyTorch before 1.6, which has none
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(damaged)


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


class RunFolder:
    """Paths, configuration and log of one run; as a context it closes what it has opened."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.model = path / "model.pth"
        self.denoiser = path / "diff_result" / "diff_model.pth"
        self.last = path / "last.pth"
        self.samples = path / "samples"
        self.metrics = path / "metrics.json"
        self.log_file = path / "log.jsonl"
        self._writer: SummaryWriter | None = None
        self._lock: BinaryIO | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        with _writing(self.path):
            for opened in (self._lock, self._writer):
                if opened:
                    opened.close()

    @by_writer
    def lock(self) -> None:
        """Make the folder and keep other processes out of it until this one ends, however it does. Raises UserError."""
        if self._lock:
            return
        path = self.path / ".lock"
        with _writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(f"another process is at work in {self.path}: wait for its end, or use a copy") from error
        except OSError:
            pass  # a file system without locks
        self._lock = lock

    def write_config(self, options: dict[str, Any]) -> None:
        """Record the resolved options together with what the figures may depend on besides them."""
        self.lock()
        versions = {name: version(name) for name in PACKAGES}
        config = {**options, "versions": versions, "git_commit": _git_commit()}
        write_json(self.config, config)

    def read_config(self) -> dict[str, Any]:
        """The options of the run; empty if the folder has no config.json, as with checkpoints of the release."""
        if not self.config.is_file():
            return {}
        try:
            return dict(json.loads(self.config.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.config} cannot be read ({error}): put back the file that the run wrote") from error

    @by_writer
    def check_writable(self) -> None:
        """Lock the folder; raise UserError now, not after hours of computing, if nothing can be written there."""
        self.lock()
        probe = self.path / ".writable"
        write_whole(probe, b"")
        probe.unlink()

    def write_last(self, state: dict[str, Any]) -> None:
        """Write last.pth: `state`, and what tells it from the file of another run or program."""
        config = self.read_config()
        run = {key: config[key] for key in UNCHANGEABLE if key in config}
        save_weights(self.last, {"version": LAST_VERSION, "run": run, **state})

    @by_writer
    def remove_last(self) -> None:
        """Remove last.pth: what is trained from now on is something else."""
        self.last.unlink(missing_ok=True)

    def read_last(self) -> dict[str, Any]:
        """What last.pth holds; empty if the run was stopped before it had saved any training.

        Raises UserError, which names the difference, if the file is of another program or of a run with other options.
        """
        config = self.read_config()
        trains = self.denoiser if config.get("stage") == "sdid" else self.model
        if not (self.last.exists() or trains.exists()):
            return {}
        state = load_weights(self.last)
        if "stage" not in state:
            raise UserError(f"{self.last} is not what a training saved: put back the file that the run wrote")
        if state.get("version") != LAST_VERSION:
            versions = f"version {state.get('version', 1)}, this program reads version {LAST_VERSION}"
            raise UserError(f"{self.last} has {versions}: go on with git commit {config.get('git_commit')}")
        there = {key: config.get(key) for key in state["run"]}
        other = [f"--{key} {value}, not {there[key]}" for key, value in state["run"].items() if there[key] != value]
        if other:
            raise UserError(f"{self.last} is of a run with {', '.join(other)}: put back the file that the run wrote")
        return state

    @property
    def how_to_go_on(self) -> str:
        """The command that goes on with this run, in words."""
        return f"go on with: python -u main.py --resume {self.path}"

    def contents(self) -> list[Path]:
        """The files and folders for people to look at, as far as they are there."""
        names = ("log.jsonl", "metrics.json", "samples/grid.png", "samples/trajectory.png", "samples/images.npz")
        pictures = ("samples/inpainted.png", "samples/png")
        paths = (self.model, self.denoiser, *(self.path / name for name in (*names, *pictures)))
        return [path for path in paths if path.exists()]

    @by_writer
    def log(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        """Append one epoch's figures to log.jsonl and to TensorBoard.

        A line of this or a later epoch, left by a run that was killed before it had saved, is replaced.
        """
        now = datetime.now(UTC).isoformat("T", "seconds")
        line = {"stage": stage, "epoch": epoch, **figures, "time": now}
        before = [old for old in self.read_log() if old.get("stage") != stage or old["epoch"] < epoch]
        write_whole(self.log_file, "".join(json.dumps(each) + "\n" for each in (*before, line)).encode())
        with _writing(self.path):
            for name, value in figures.items():
                self.tensorboard.add_scalar(f"{stage}/{name}", value, epoch)
            self.tensorboard.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl. Raises UserError if it is damaged."""
        try:
            lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
            return [dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.log_file} cannot be read ({error}): mend or remove it") from error

    @by_writer
    def log_picture(self, name: str, picture: Tensor, epoch: int) -> None:
        """Show a picture, uint8 `[3,H,W]`, in TensorBoard."""
        with _writing(self.path):
            self.tensorboard.add_image(name, picture, epoch)

    @property
    def tensorboard(self) -> SummaryWriter:
        """The writer of this run's curves, opened at first use."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        return self._writer
