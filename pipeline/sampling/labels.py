"""Classes chosen by name or number."""

from collections import Counter
from collections.abc import Sequence

from errors import UserError


def find_labels(
    wanted: Sequence[int | str], present: Sequence[int], class_names: Sequence[str] | None
) -> tuple[int, ...]:
    """The labels that `wanted` names, out of those `present`; the word "all" stands for all of these.

    A name is looked up before a number, as classes may be named by other numbers than theirs. Its case matters only
    where names differ by nothing else. Raises UserError, which names the classes that there are, for any other, or if
    none is wanted.
    """
    numbers = {str(label): label for label in present}
    names = {class_names[label]: label for label in present} if class_names else {}
    count = Counter(map(str.casefold, names))
    in_any_case = {name.casefold(): label for name, label in names.items() if count[name.casefold()] == 1}
    known = {"all": present} | {word: [label] for word, label in (numbers | in_any_case | names).items()}
    choices = ", ".join(f"{label} ({class_names[label]})" if class_names else str(label) for label in present)
    found: list[int] = []
    for word in map(str, wanted):
        if word not in known and word.casefold() not in known:
            raise UserError(f"there is no class {word!r}: choose from {choices}, or all")
        found += known[word] if word in known else known[word.casefold()]
    if not found:
        raise UserError(f"no class is named: choose from {choices}, or all")
    return tuple(found)
