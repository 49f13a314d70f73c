"""Files are written atomically, so that no reader sees a partial one; checkpoints are read without trusting them."""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import files
from errors import UserError
from pipeline.runtime.processes import on_rank_0

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which other programs save a state dict."""

SCALE = "_scale"
"""Ends the name of the scales `[R]` of an int8 weight `[R,...]`: each row is multiplied by its own."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context in which a failure to write becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make room there or choose another place") from error


@on_rank_0
def check_place(path: Path | None) -> None:
    """Raise UserError now, not after hours of computing, if a file could not be written there; None is no place."""
    if path:
        with writing(path):
            files.check_place(path)


@on_rank_0
def write_file(path: Path, content: bytes) -> None:
    """Write a file whole, see `files.write_whole`, in rank 0 alone. Raises UserError."""
    with writing(path):
        files.write_whole(path, content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people and programs, whole."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def save_weights(path: Path, content: Any) -> None:
    """Write a state dict, or a dict that holds some, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a network, whichever program saved it; see `load_checkpoint`.

    A dictionary around it (WRAPPERS) is removed, as are the prefixes that DistributedDataParallel ("module.") and
    torch.compile ("_orig_mod.") give to the names; int8 weights are multiplied by their scales. Raises UserError if
    there is no state dict in the file.
    """
    content = load_checkpoint(path)
    if "optimizer" in content and "run" in content:
        raise UserError(f"{path} is what --resume reads: name the model.pth beside it")
    inner = (content[key] for key in WRAPPERS if isinstance(content.get(key), dict))
    weights = next(inner, content)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{path} does not hold the weights of a network: name a file with a state dict")
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    for name, value in list(weights.items()):
        if value.dtype == torch.int8 and name + SCALE in weights:
            weights[name] = value * per_row(weights.pop(name + SCALE), value)
    return weights


def per_row(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales `[R]` in the shape `[R,1,...]`, in which they apply to the rows of a weight `[R,...]`."""
    return scales.view(-1, *[1] * (weight.dim() - 1))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_weights` wrote, onto the CPU and without running code from the file.

    Raises UserError if the file is missing or unreadable, or if a checksum in it shows that a bit has changed.
    """
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {wrong}: train first, or name a file of weights that a run has written")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign or damaged bytes fail in any way while they are unpickled
        cause = f"{path} is no checkpoint that can be read ({type(error).__name__})"
        raise UserError(f"{cause}: it is damaged, cut short or another file; restore a copy, or train again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a checksum is wrong: torch.load does not verify them."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format of PyTorch before 1.6, which has none
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(damaged)
