"""Arrays computed once for a data set and kept between runs, in the user's cache folder."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from files import from_cache, to_cache

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


def _read(path: Path) -> Arrays:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive["names"]}  # a damaged index may lose some
