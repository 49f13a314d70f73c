"""The one exception that stands for a mistake of the user, how a script reports it, and notes to the user."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2; everything else keeps its traceback. From Python it is a
    ValueError like any other. (What argparse calls to read a value must raise ArgumentTypeError instead: of a
    ValueError it hides the message.)
    """


def note(text: str) -> None:
    """Say in one line on stderr what was decided, where another decision could have been meant."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def reported() -> Iterator[None]:
    """Context of a script: a mistake of the user, or of the file system, is one line on stderr and exit status 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
