"""A run folder: where a run's files are, how they are written whole, and how they are read back.

config.json                    resolved options, image shape, versions, git commit, lineage of the weights
model.pth                      autoencoder, plain state dict
diff_result/diff_model.pth     denoiser, plain state dict
last.pth                       what --resume needs: stage, epoch, step, weights, optimizer, and what run it is of
log.jsonl, tensorboard/        training curves
samples/                       image grids and images.npz
metrics.json                   metrics, each with its protocol
report.html                    a page that shows all this
.lock                          held by the process that works here

Of several processes at one run, one writes; in the others all that writes does nothing.
"""

import functools
import json
import subprocess
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

import files
from errors import UserError
from pipeline.checkpoints import check_place, load_checkpoint, write_file, write_json, writing
from pipeline.runtime.processes import on_rank_0

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "spikingjelly", "numpy", "scipy", "scikit-learn", "pillow"),
    *("torchmetrics", "pytorch-fid"),
)
"""What training and metrics depend on; their versions are recorded."""

LOG_KEYS = {"stage", "epoch", "images", "images_per_second"}
RECORD_KEYS = {"name", "value", "protocol", "split", "num_generated", "num_real"}
"""What each line of log.jsonl and each record of metrics.json has, whatever version of this program wrote it."""


def versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    return {name: version(name) for name in PACKAGES}


def program_version(root: Path) -> dict[str, Any]:
    """The commit of the program in `root`, and whether its files differ from those of the commit; None without git."""
    prefix = _git(root, "rev-parse", "--show-prefix")  # not empty where another repository contains this folder
    commit = _git(root, "rev-parse", "HEAD") if prefix == "" else None
    changes = _git(root, "status", "--porcelain", "--", "*.py", "*.cpp", "*.h") if commit else None
    return {"git_commit": commit or None, "git_changed": None if changes is None else bool(changes)}


@functools.cache
def this_program() -> dict[str, Any]:
    """The version of the program that runs: that of its start, whatever becomes of its files during a training."""
    return program_version(ROOT)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read_records(path: Path, parse: Callable[[str], Iterable], needed: set[str]) -> list[dict[str, Any]]:
    """The JSON objects in a file, which have the keys `needed`. Raises UserError."""
    if not path.is_file():
        return []
    try:
        records = [dict(**record) for record in parse(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): repair or remove it") from error
    if missing := {key for record in records for key in needed - record.keys()}:
        raise UserError(f"{path} has a record without {', '.join(sorted(missing))}: repair or remove it")
    return records


class RunFolder:
    """Paths of one run, and its files read and written; as a context it closes what it has opened, the lock last."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.model = path / "model.pth"
        self.denoiser = path / "diff_result" / "diff_model.pth"
        self.last = path / "last.pth"
        self.samples = path / "samples"
        self.metrics = path / "metrics.json"
        self.report = path / "report.html"
        self.log_file = path / "log.jsonl"
        self._curves: dict[str, SummaryWriter] = {}
        self._lock: FileLock | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.path), ExitStack() as closing:  # closes the last first, whatever fails
            if self._lock:
                closing.callback(self._lock.release)
            for curves in self._curves.values():
                closing.callback(curves.close)
            self._lock, self._curves = None, {}  # whoever goes on with this object takes both anew

    @on_rank_0
    def lock(self) -> None:
        """Make the folder and keep other processes out of it until this one ends, however it does. Raises UserError."""
        if self._lock:
            return
        path = self.path / ".lock"
        with writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            path.touch()
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"another process is using {self.path}: wait until it ends, or use a copy") from error
        except (OSError, NotImplementedError):
            pass  # a file system without locks
        else:
            for folder in (self.path, self.denoiser.parent, self.samples, self.samples / "png"):
                files.remove_parts(folder)
        self._lock = lock

    def write_config(self, options: dict[str, Any]) -> None:
        """Record the options and the data of a training, together with what else its results may depend on."""
        self.lock()
        write_json(self.config, {**options, "versions": versions(), **this_program()})

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """Where the weights come from, see `pipeline.lineage`; empty if config.json does not say."""
        return self.read_config().get("lineage", [])

    @on_rank_0
    def write_lineage(self, lineage: list[dict[str, Any]]) -> None:
        """Record it in config.json."""
        write_json(self.config, self.read_config() | {"lineage": lineage})

    def read_config(self) -> dict[str, Any]:
        """The options of the run; empty if the folder has no config.json, as with checkpoints of the release.

        A run from before there was --condition had prototypes if there were images for them (0: none).
        """
        if not self.config.is_file():
            return {}
        try:
            config = dict(**json.loads(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.config} cannot be read ({error}): restore the file that the run wrote") from error
        if not config.get("images_per_prototype", 1):
            del config["images_per_prototype"]
        return {"condition": "prototype" if "images_per_prototype" in config else "none"} | config

    def require_config(self) -> dict[str, Any]:
        """The same; raises UserError if the folder has none."""
        config = self.read_config()
        if not config:
            raise UserError(f"{self.path} is not a run folder: it has no config.json")
        return config

    @property
    def trained(self) -> "RunFolder":
        """The folder of the training: another one where this holds only what `--checkpoint` wrote to --result_path."""
        checkpoints = (record.get("checkpoint") for record in self.read_records())
        elsewhere = None if self.config.exists() else next(filter(None, checkpoints), None)
        return RunFolder(Path(elsewhere).parent) if elsewhere else self

    @on_rank_0
    def check_writable(self) -> None:
        """Lock the folder; raise UserError now, not after hours of computing, if nothing can be written there."""
        self.lock()
        check_place(self.metrics)

    @on_rank_0
    def remove_last(self) -> None:
        """Remove last.pth: what is trained from now on is something else."""
        self.last.unlink(missing_ok=True)

    def unfinished_stage(self) -> str:
        """The stage that last.pth has stopped in; empty if it is finished, or if nothing can be resumed from there."""
        try:
            state = load_checkpoint(self.last)
        except UserError:
            return ""
        stage = state.get("stage", "")
        epochs = self.read_config().get("diffusion_epochs" if stage == "sdid" else "epochs", 0)
        return stage if state.get("epoch", 0) < epochs else ""

    @property
    def program(self) -> str:
        """The program that wrote this run, in words; a copy without git knows of no commit."""
        commit = self.read_config().get("git_commit")
        return f"git commit {commit}" if commit else "the copy of this program that began it"

    @property
    def resume_hint(self) -> str:
        """The command that goes on with this run, in words."""
        return f"resume with: python -u main.py --resume {self.path}"

    def contents(self) -> list[Path]:
        """The files and folders for people to look at, as far as they are there."""
        names = (
            "report.html",
            "log.jsonl",
            "metrics.json",
            "samples/grid.png",
            "samples/trajectory.png",
            "samples/images.npz",
        )
        images = ("samples/inpainted.png", "samples/png")
        paths = (self.model, self.denoiser, *(self.path / name for name in (*names, *images)))
        return [path for path in paths if path.exists()]

    @on_rank_0
    def log(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        """Append one epoch's values to log.jsonl and to TensorBoard.

        What a run that was killed before it had saved has left of this or a later epoch is replaced in both.
        """
        now = datetime.now(UTC).isoformat("T", "seconds")
        line = {"stage": stage, "epoch": epoch, **values, "time": now}
        before = [old for old in self.read_log() if old.get("stage") != stage or old["epoch"] < epoch]
        write_file(self.log_file, "".join(json.dumps(each) + "\n" for each in (*before, line)).encode())
        with writing(self.path):
            curves = self._open_curves(stage, epoch)
            for name, value in values.items():
                curves.add_scalar(f"{stage}/{name}", value, epoch)
            curves.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; none if it does not exist. Raises UserError if it is damaged."""
        return _read_records(self.log_file, lambda text: map(json.loads, text.splitlines()), LOG_KEYS)

    @on_rank_0
    def log_image(self, stage: str, name: str, image: Tensor, epoch: int) -> None:
        """Log an image of an epoch, uint8 `[3,H,W]`, in TensorBoard."""
        with writing(self.path):
            self._open_curves(stage, epoch).add_image(name, image, epoch)

    def _open_curves(self, stage: str, epoch: int) -> "SummaryWriter":
        """The TensorBoard writer of a stage; as it opens, TensorBoard forgets this and later epochs of earlier calls.

        Each stage has a folder of its own because it forgets them of everything in a folder.
        """
        from torch.utils.tensorboard import SummaryWriter  # here because only trainings need it: it takes a second

        if stage not in self._curves:
            self._curves[stage] = SummaryWriter(str(self.path / "tensorboard" / stage), purge_step=epoch)
        return self._curves[stage]

    def read_records(self) -> list[dict[str, Any]]:
        """The records of metrics.json; none if it does not exist. Raises UserError if it is damaged."""
        return _read_records(self.metrics, json.loads, RECORD_KEYS)
