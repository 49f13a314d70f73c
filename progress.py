"""How far long work has come: a bar on a terminal, a line a minute where stderr is a file. Needs no PyTorch."""

import io
import sys
from contextlib import suppress

from tqdm import tqdm

LINE = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt}{unit}), {elapsed} so far, {remaining} left{postfix}"


class _Lines(io.TextIOBase):
    """Where stderr is no terminal, tqdm writes here: each state of a bar becomes a line, and erasing it nothing."""

    def write(self, text: str) -> int:
        if text.strip():
            with suppress(OSError):  # nobody reads it: the work matters more
                print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def progress_bar(total: int, title: str, unit: str = "images", done: int = 0, shown: bool = True) -> tqdm:
    """A context for work on `total` things, `done` of them before: tell it of each batch with `update(count)`.

    On a terminal a bar appears after a second and vanishes at the end; elsewhere there is a line a minute. With
    `shown` False there is nothing, as in all processes but the first.
    """
    options = {"total": total, "initial": done, "desc": title, "unit": f" {unit}", "disable": not shown}
    if sys.stderr and sys.stderr.isatty():
        return tqdm(**options, leave=False, delay=1)
    return tqdm(**options, leave=False, delay=60, mininterval=60, miniters=1, bar_format=LINE, file=_Lines())


class Pace:
    """How long work of `total` steps will still take, from the steps that were watched but the first, which is slow."""

    FEWEST_STEPS, FEWEST_SECONDS = 20, 10  # one of which it takes to know

    def __init__(self, total: int):
        self.total = total
        self._began: tuple[int, float] | None = None

    def seconds_left(self, done: int, now: float) -> float | None:
        """Seconds until all steps are done, `done` of them by `now`, in seconds of any clock; None: not known yet."""
        if self._began is None:
            self._began = done, now
        steps, seconds = done - self._began[0], now - self._began[1]
        if steps < self.FEWEST_STEPS and (seconds < self.FEWEST_SECONDS or not steps):
            return None
        return seconds / steps * (self.total - done)


def in_words(seconds: float) -> str:
    """A duration, such as 1 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
