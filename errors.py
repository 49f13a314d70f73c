"""The one exception that stands for a mistake of the user, how a script reports it, and notes to the user."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGPIPE = 13
"""Number of the signal that ends a program whose output nobody reads any more; Python has no name for it on Windows."""


class UserError(ValueError):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2; everything else keeps its traceback. From Python it is a
    ValueError like any other. (What argparse calls to read a value must raise ArgumentTypeError instead: of a
    ValueError it hides the message.)
    """


def say_on_stderr(message: str) -> None:
    """Print a message in one line on stderr. If nobody reads it, as where a pipe is closed, that stops no work."""
    with suppress(OSError):
        print(*message.splitlines(), file=sys.stderr)


def note(text: str) -> None:
    """Say in one line on stderr what was decided, where another decision could have been meant."""
    say_on_stderr(f"note: {text}")


@contextmanager
def reported() -> Iterator[None]:
    """Context of a program: a mistake of the user, or of the file system, is one line on stderr and exit status 2.

    If nobody reads what it prints any more, as after `| head -1`, it ends without a word, as other programs do.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        sys.exit(128 + SIGPIPE)
    except (UserError, OSError) as error:
        say_on_stderr(f"error: {error}")
        drop_output()
        sys.exit(2)


def drop_output() -> None:
    """Have what stdout or stderr cannot write go nowhere, as if it were read: Python would complain at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
