"""A run folder: where a run's files are, how they are written whole, and how they are read back.

config.json                    resolved options, image shape, versions, git commit
model.pth                      autoencoder, plain state dict
diff_result/diff_model.pth     denoiser, plain state dict
last.pth                       what --resume needs: stage, epoch, step, weights, optimizer
log.jsonl, TensorBoard files   training curves
samples/                       pictures and images.npz
metrics.json                   figures, each with its protocol
"""

import io
import json
import os
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from errors import UserError

PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader never meets half of it. Raises UserError."""
    fresh = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make room there or choose another place") from error


def save_weights(path: Path, content: Any) -> None:
    """Write a state dict, or a dict that holds some, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_weights(path: Path) -> dict[str, Any]:
    """Read what `save_weights` wrote, onto the CPU and without running code from the file.

    Raises UserError if the file is missing or unreadable.
    """
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {wrong}: train first, or name a file of weights that a run has written")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign or damaged bytes fail in any way while they are unpickled
        raise UserError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}): it may be cut short or another file"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


class RunFolder:
    """Paths, configuration and log of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.model = path / "model.pth"
        self.denoiser = path / "diff_result" / "diff_model.pth"
        self.last = path / "last.pth"
        self.samples = path / "samples"
        self.metrics = path / "metrics.json"
        self._writer: SummaryWriter | None = None

    def write_config(self, options: dict[str, Any]) -> None:
        """Record the resolved options together with what the figures may depend on besides them."""
        versions = {name: version(name) for name in PACKAGES}
        config = {**options, "versions": versions, "git_commit": _git_commit()}
        write_whole(self.config, (json.dumps(config, indent=1) + "\n").encode())

    def read_config(self) -> dict[str, Any]:
        """The options of the run; empty if the folder has no config.json, as with checkpoints of the release."""
        if not self.config.is_file():
            return {}
        try:
            return dict(json.loads(self.config.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.config} cannot be read ({error}): put back the file that the run wrote") from error

    def check_writable(self) -> None:
        """Make the folder; raise UserError now, not after hours of computing, if nothing can be written there."""
        probe = self.path / ".writable"
        write_whole(probe, b"")
        probe.unlink()

    def read_last(self) -> dict[str, Any]:
        """What last.pth holds; empty if the run was stopped before it had written any weights."""
        if not (self.last.exists() or self.model.exists()):
            return {}
        state = load_weights(self.last)
        if "stage" not in state:
            raise UserError(f"{self.last} is not what a training saved: put back the file that the run wrote")
        return state

    def contents(self) -> list[Path]:
        """The files and folders for people to look at, as far as they are there."""
        names = ("log.jsonl", "metrics.json", "samples/grid.png", "samples/trajectory.png", "samples/images.npz")
        paths = (self.model, self.denoiser, *(self.path / name for name in (*names, "samples/png")))
        return [path for path in paths if path.exists()]

    def log(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        """Append one epoch's figures to log.jsonl and to TensorBoard."""
        line = {
            "stage": stage,
            "epoch": epoch,
            **figures,
            "time": datetime.now(timezone.utc).isoformat("T", "seconds"),
        }
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self.tensorboard.add_scalar(f"{stage}/{name}", value, epoch)
        self.tensorboard.flush()

    def log_picture(self, name: str, picture: Tensor, epoch: int) -> None:
        """Show a picture, uint8 `[3,H,W]`, in TensorBoard."""
        self.tensorboard.add_image(name, picture, epoch)

    @property
    def tensorboard(self) -> SummaryWriter:
        """The writer of this run's curves, opened at first use."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        return self._writer
