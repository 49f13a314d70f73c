"""What each function of the library does around its work: torch as the command line has it, messages in Python's words.

The rest of the program, and whatever calls it, finds torch as it was: whatever is set here is set back.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

import torch

from errors import UserError
from pipeline.options.sections import DECLARATIONS, KINDS
from pipeline.runtime.device import exact_float32, keep_freed_memory
from pipeline.training.interruption import Interrupted

ARGUMENT = re.compile(r"(?<![\w-])(?:python -u main\.py )?--(?P<name>\w+)(?: (?P<value>[^\s,;:]+))?")
FUNCTIONS = {
    **{"all": "main.py", "vqsvae": "train_autoencoder", "sdid": "train_denoiser", "evaluate": "evaluate"},
    **{"sample": "SpikingDiffusion", "inpaint": "SpikingDiffusion.inpaint"},
}
"""What has the place of `--stage` in the library."""

_lock, _calls, _settings = threading.Lock(), 0, ExitStack()


@contextmanager
def library_call() -> Iterator[None]:
    """Context, or decorator, of a function that the library offers."""
    try:
        with _torch_of_our_own():
            yield
    except (UserError, Interrupted) as error:
        error.args = (in_python(str(error)),)
        raise


@contextmanager
def _torch_of_our_own() -> Iterator[None]:
    """Context in which torch computes as if no program had changed its settings."""
    with _for_all_threads(), ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _for_all_threads() -> Iterator[None]:
    """The part of it that all threads share: the first to come here sets it, and the last to leave sets it back."""
    global _calls
    with _lock:
        if not _calls:
            keep_freed_memory()
            _settings.enter_context(_float32())
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _settings.close()


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with exact_float32():
            yield
    finally:
        torch.set_default_dtype(before)


def in_python(message: str) -> str:
    """A message of the command line in Python's words: `--seed 3` is `seed=3`, and `--stage sdid` train_denoiser."""
    return ARGUMENT.sub(_argument, message)


def _argument(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if name not in DECLARATIONS:
        return found[0]
    if name == "stage" and value in FUNCTIONS:
        return FUNCTIONS[value]
    if name == "checkpoint":
        name = "SpikingDiffusion.load"
    elif value is not None and _is_value(name, value):
        return f"{name}={value}" if _is_number(value) or KINDS[name] in PATHS else f'{name}="{value}"'
    return name if value is None else f"{name} {value}"


PATHS = (Path, Path | None)


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(\.\d+)?", word))


def _is_value(name: str, word: str) -> bool:
    """Whether the word behind an option's name is a value of it, and not the next one of the sentence."""
    kind, declared = KINDS[name], DECLARATIONS[name]
    if kind in PATHS:
        return "/" in word or word.isupper()
    kinds = get_args(kind) or (kind,)
    return word in (*declared.choices, declared.absent) or (not {int, float}.isdisjoint(kinds) and _is_number(word))
