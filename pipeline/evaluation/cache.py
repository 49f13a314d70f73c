"""Arrays computed once for a data set and kept between runs, in the user's cache folder."""

import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from files import cache_folder, from_cache, to_cache

Arrays = dict[str, np.ndarray]


def cached(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays cached under `name`, which must identify everything they depend on; computed and cached if absent.

    A file that is damaged (each array in it has a checksum) is replaced, with a warning.
    """
    kept = from_cache(f"{name}.npz", _read)
    if kept is not None:
        return kept
    arrays = compute()
    buffer = io.BytesIO()
    contents: dict[str, Any] = {"names": np.array(list(arrays)), **arrays}
    np.savez(buffer, **contents)
    to_cache(f"{name}.npz", buffer.getvalue())
    return arrays


def forget(pattern: str, days: float) -> None:
    """Remove the entries whose names match, as in "noise-*", and that were made before the last `days`."""
    with suppress(OSError):  # of another process that does the same, or no folder
        for path in cache_folder().glob(f"{pattern}.npz"):
            if path.stat().st_mtime < time.time() - days * 86400:
                path.unlink()


def _read(path: Path) -> Arrays:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive["names"]}  # a damaged index may lose some
