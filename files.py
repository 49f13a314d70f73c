"""Files that are written whole, and the cache: those that are made once and kept between runs.

The cache saves time and is never required: where it cannot be read or written, the file is made again.
"""

import errno
import functools
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from errors import say_on_stderr

PARTS = f"*.{'[0-9a-f]' * 8}.part"
LONGEST_WRITE = 3600.0  # seconds, after which whoever wrote is dead

Value = TypeVar("Value")


def expand(path: str | Path) -> Path:
    """The path with `~` replaced; left alone if there is no such home."""
    return Path(os.path.expanduser(path))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader never meets half of it. Raises OSError.

    When this returns the file is on the disk: a power loss afterwards leaves it, one before leaves the file of before.
    Several processes may write the same file at once; the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = part_of(path)
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)  # the disk may be full
    _sync_folder(path.parent)


def check_place(path: Path) -> None:
    """Raise OSError now, not after hours of computing, if `write_whole` could not write there; nothing stays there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # those that are missing can be made
    probe = part_of(folder / f"{path.name}.try")
    probe.touch()
    probe.unlink()


def part_of(path: Path) -> Path:
    """A name beside `path` that no other process has, for a file that is being written."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def remove_parts(folder: Path, before: float = float("inf")) -> None:
    """Remove files that killed processes had half written, if that was `before` a time in seconds of the epoch."""
    for part in folder.glob(PARTS):
        with suppress(OSError):
            if part.stat().st_mtime < before:
                part.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the names of the files there."""
    with suppress(OSError):  # Windows cannot open a folder, some network file systems cannot synchronise it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- the cache ----


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/spiking-diffusion`, or `~/.cache/spiking-diffusion` where the variable is not set.

    Raises FileNotFoundError for a user without a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiking-diffusion"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder") from error


def from_cache(name: str, read: Callable[[Path], Value]) -> Value | None:
    """`read(path)` of the file of this name in the cache, or None where there is none that can be opened.

    If `read` raises anything else, the file is damaged: a warning names it, and None is returned.
    """
    try:
        path = cache_folder() / name
        return read(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except Exception as error:  # damage shows in the archive, a checksum or the contents, each with its own error
        _warn(f"{path} is damaged ({type(error).__name__}): recreating it")
        return None


def to_cache(name: str, content: bytes) -> Path | None:
    """Keep a file in the cache; None, and one warning, where that cannot be."""
    try:
        path = cache_folder() / name
        write_whole(path, content)
        remove_parts(path.parent, time.time() - LONGEST_WRITE)
        return path
    except OSError as error:
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cause = f"cannot write to the cache in {folder} ({error.strerror})"
        _warn(f"{cause}, so the next run repeats this work: set XDG_CACHE_HOME")
        return None


@functools.cache
def _warn(text: str) -> None:
    """Say the same only once."""
    say_on_stderr(f"warning: {text}")
