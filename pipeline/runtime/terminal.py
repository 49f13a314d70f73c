"""What a terminal that knows only ASCII is given to print."""

import io
import sys


def print_anywhere() -> None:
    """Have stdout and stderr write what they have no character for as an escape sequence instead of raising.

    For every program to call first: a "µ" in the last line must not cost the hours before it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
