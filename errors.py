"""The one exception that stands for a mistake of the user, not of the program, and how a script reports it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2; everything else keeps its traceback. From Python it is a
    ValueError like any other. (What argparse calls to read a value must raise ArgumentTypeError instead: of a
    ValueError it hides the message.)
    """


@contextmanager
def reported() -> Iterator[None]:
    """Context of a script: a mistake of the user, or of the file system, is one line on stderr and exit status 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
