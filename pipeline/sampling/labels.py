"""Classes chosen by name or number."""

import unicodedata
from collections.abc import Sequence

from errors import UserError
from pipeline.options.sections import ALL, ANY


def find_labels(
    wanted: Sequence[int | str], present: Sequence[int], class_names: Sequence[str] | None
) -> tuple[int, ...]:
    """The labels that `wanted` names, out of those `present`; the word "all" stands for all of these.

    An integer is the number of a class. A word is, of these, the first that there is: the exact name of a class, its
    name apart from case, spacing and the Unicode form of its letters, or its number. Raises UserError, which names the
    classes that there are, for any other, for a word that could be several of them, or if none is wanted.
    """
    described = {label: f"{label} ({class_names[label]})" if class_names else str(label) for label in present}
    choices = f"choose from {', '.join(described.values())}, {ALL} or {ANY}"
    found: list[int] = []
    for word in wanted:
        labels = _labels_of(word, present, class_names)
        if len(labels) > 1:
            several = " or ".join(described[label] for label in labels)
            raise UserError(f"{word!r} could be class {several}: give its exact name, or its number")
        if not labels and str(word).casefold() != ALL:
            raise UserError(f"there is no class {str(word)!r}: {choices}")
        found += labels or present
    if not found:
        raise UserError(f"no class is named: {choices}")
    return tuple(found)


def _labels_of(word: int | str, present: Sequence[int], class_names: Sequence[str] | None) -> list[int]:
    """The labels that a word may mean: none, one, or several that are named alike."""
    numbered = [label for label in present if str(label) == str(word).strip()]
    if not isinstance(word, str) or class_names is None:
        return numbered
    exact = [label for label in present if class_names[label] == word]
    alike = [label for label in present if _folded(class_names[label]) == _folded(word)]
    return exact or alike or numbered


def _folded(name: str) -> str:
    """A name apart from case, spacing and the Unicode form of its letters."""
    return unicodedata.normalize("NFKC", " ".join(name.split()).casefold()).casefold()
