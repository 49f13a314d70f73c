"""SIGTERM, Ctrl-C and a closed pipe during training: recorded, so that it can save before it ends."""

import signal
import threading
from types import FrameType

from errors import SIGPIPE

SIGNALS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
REASONS = SIGNALS | {SIGPIPE: "the output is closed"}


class Interrupted(Exception):
    """Training was stopped cleanly by a signal; the message is one line that says how to resume.

    `status` is the exit status of a program stopped by a signal: 128 plus its number.
    """

    def __init__(self, number: int, resume_hint: str):
        super().__init__(f"{REASONS[number]}: saved; {resume_hint}")
        self.status = 128 + number


class Interruption:
    """Context in which the first signal is only recorded, as `signal`, and the second takes effect at once.

    Code that checks `signal` stops cleanly, and Interrupted is raised at the end of the context. A signal that was
    ignored before, as with nohup, stays ignored, and one whose handler is not Python's, which could not be restored,
    keeps it. Threads other than the main one receive no signals: there, nothing is changed.
    """

    def __init__(self, resume_hint: str):
        self.resume_hint = resume_hint
        self.signal: int | None = None
        receives = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in SIGNALS if receives}
        left_alone = (signal.SIG_IGN, None)
        self._handlers = {number: handler for number, handler in handlers.items() if handler not in left_alone}

    def __enter__(self) -> "Interruption":
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._let_act()
        if self.signal and error is None:
            raise Interrupted(self.signal, self.resume_hint)

    def say(self, line: str) -> None:
        """Print a line. If that is impossible, as nobody reads it any more after `| head -1`, it is a signal, too."""
        try:
            print(line, flush=True)
        except OSError:
            self.signal = SIGPIPE

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._let_act()

    def _let_act(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
