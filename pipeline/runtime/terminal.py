"""Streams that can be printed to, whatever the terminal knows and whether or not there is one."""

import io
import os
import sys


def print_anywhere() -> None:
    """Have stdout and stderr write what they have no character for as an escape sequence instead of raising.

    One that is closed (`2>&-`) writes to nowhere; else the next file that is opened would take its place, and what
    libraries print. For every program to call first: a "µ" in the last line must not cost the hours before it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (to the end of the process)
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
