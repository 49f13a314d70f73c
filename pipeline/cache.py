"""What is computed once for a data set and kept between runs, in the user's cache folder."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from errors import UserError
from models.fused_lif import cache_folder
from pipeline.run_folder import write_whole

Arrays = dict[str, np.ndarray]


def cached(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays kept under `name`, which must say all they depend on; computed and kept if there are none.

    Raises UserError where the file is damaged (each array in it has a checksum) or cannot be written.
    """
    path = cache_folder() / f"{name}.npz"
    if path.exists():
        return _read(path)
    arrays = compute()
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array(list(arrays)), **arrays)
    write_whole(path, buffer.getvalue())
    return arrays


def _read(path: Path) -> Arrays:
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive["names"]}  # a damaged index may lose some
    except Exception as error:  # damage shows in the archive, a checksum or the arrays, each with its own error
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it, it is computed again") from error
