"""The declaration of an option, and parsers of option values; the options themselves are in sections.py."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from files import expand


class Role(IntEnum):
    """How firmly a saved run fixes an option's value; each level also has the properties of those after it."""

    IDENTITY = 0  # part of the trained model: whoever uses the run must share it
    NETWORKS = 1  # inherited by a new run that starts from this one
    TRAINING = 2  # cannot change when the training is resumed
    SETTING = 3  # later calls on the run have it as their default
    RESUMED = 4  # of one call, and of the calls that resume it
    CALL = 5  # of one call only


POSITIVE = 1e-9
"""The least value of an option that must be greater than 0."""


class Limits(TypedDict):
    """Bounds that several options share."""

    low: float
    high: float
    metavar: str


class Declaration(NamedTuple):
    """Everything about an option except its name, type and default."""

    help: str
    role: Role
    choices: Collection[str] = ()
    low: float = float("-inf")
    high: float = float("inf")
    metavar: str | None = None
    absent: str | None = None  # the word that stands for None on the command line and in the help
    shown: str | None = None  # the default in the help, where it is neither the value nor `absent`
    parse: Callable[[str], Any] | None = None
    common: bool = False  # one of the few that most people need, which the help lists first
    of: Collection[str] = ()  # the models, denoisers or neurons that have the option; empty: it belongs to all
    stages: Collection[str] = ()  # the values of --stage with which it has an effect; empty: all


def option(default: Any, help: str, role: Role = Role.SETTING, **more: Any) -> Any:
    """A dataclass field that declares an option; for the rest see Declaration."""
    return field(default=default, metadata={"option": Declaration(help, role, **more)})


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A reader of numbers of this kind from `low` to `high`."""
    if low == POSITIVE:
        bounds = "greater than 0" + ("" if high == float("inf") else f" and at most {high}")
    else:
        bounds = f"at least {low}" if high == float("inf") else f"from {low} to {high}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}" + (", a whole number" if kind is int else ""))
        return value

    return read


def autoencoder_weights(text: str) -> Path:
    """A file of weights, or the one in a run folder."""
    path = expand(text)
    return path / "model.pth" if path.is_dir() else path


def temperature_or_auto(text: str) -> float | str:
    """A positive number, or "auto"."""
    return text if text == "auto" else number(float, POSITIVE)(text)


def comma_separated(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_metrics(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names among `known`, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        wanted = comma_separated(text)
        strange = [name for name in wanted if name not in known]
        if strange or not wanted:
            wrong = f"unknown metric {strange[0]!r}" if strange else "no metric named"
            raise argparse.ArgumentTypeError(f"{wrong}: choose from {', '.join(known)}")
        return wanted

    return read
