"""Option values from text and back: the command line, its help, and config.json."""

import argparse
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args

from errors import UserError
from files import expand
from pipeline.options.declaration import number
from pipeline.options.sections import DECLARATIONS, DEFAULTS, KINDS, SECTIONS, names

MOST_USED = "most used"
TITLES = {"autoencoder": "autoencoder (stage 1)", "denoiser": "denoiser (stage 2)", "neuron": "neurons (both stages)"}


def as_written(value: Any) -> Any:
    """An option's value as stored in config.json; paths are absolute, so that later calls may run in any folder."""
    return str(value.absolute()) if isinstance(value, Path) else value


def as_typed(name: str, value: Any) -> str:
    """An option's value as it would be typed."""
    if value is None:
        return str(DECLARATIONS[name].absent)
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_read(name: str, value: Any, source: str = " in config.json") -> Any:
    """An option's value from config.json or from Python, with the same checks as one that was typed.

    Raises UserError, which names the source, if the value is invalid.
    """
    kind = KINDS[name]
    kinds = get_args(kind) or (kind,)
    strange = isinstance(value, bool) != (kind is bool) or (Path in kinds and not isinstance(value, str | Path))
    if value is None and type(None) in kinds:
        return None
    if value is None or strange:
        words = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
        raise UserError(f"--{name}{source} is {value}, not of type {words}")
    if kind is bool:
        return value
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    try:
        value = reader(name)(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"--{name}{source}: {error}") from error
    choices = DECLARATIONS[name].choices
    if choices and value not in choices:
        raise UserError(f"--{name}{source} is {value}, not one of {', '.join(map(str, choices))}")
    return value


def option_in_words(name: str, value: Any) -> str:
    """The value of an option as typed on the command line."""
    if value is None:
        return DECLARATIONS[name].absent or DECLARATIONS[name].shown or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def reader(name: str) -> Callable[[str], Any]:
    """The function that parses an option's value; it raises ArgumentTypeError or ValueError."""
    declared, kind = DECLARATIONS[name], KINDS[name]
    if isinstance(kind, UnionType) and not declared.parse:
        kind = next(each for each in get_args(kind) if each is not type(None))
    if declared.parse:
        read = declared.parse
    elif kind is Path:
        read = expand
    elif kind in (int, float) and not declared.choices:
        read = number(kind, declared.low, declared.high)
    else:
        read = kind
    return lambda text: None if text == declared.absent else read(text)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (--help lists the options)")


def build_parser(description: str) -> Parser:
    """The parser of all options; its result contains only those that were typed.

    In the help, the options that most people need come first, then the others by section.
    """
    parser = Parser(
        usage="%(prog)s [--OPTION VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    groups = {MOST_USED: [name for name, declared in DECLARATIONS.items() if declared.common]}
    for name, section in SECTIONS.items():
        groups[TITLES.get(name, name)] = [key for key in names(section) if not DECLARATIONS[key].common]
    for title, keys in groups.items():
        group = parser.add_argument_group(title)
        for key in keys:
            _add(group, key)
    return parser


def _add(group: argparse._ArgumentGroup, key: str) -> None:
    """Add one option to a group of the parser."""
    declared, default = DECLARATIONS[key], DEFAULTS[key]
    arguments: dict[str, Any] = {"type": reader(key), "metavar": declared.metavar, "choices": declared.choices or None}
    if KINDS[key] is bool:
        arguments = {"action": BooleanOptionalAction if declared.of or default else "store_true"}
    shown = declared.shown or declared.absent or as_shown(default)
    group.add_argument(f"--{key}", help=f"{declared.help} [{shown}]", **arguments)


def as_shown(default: Any) -> str:
    """A default as the help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)
