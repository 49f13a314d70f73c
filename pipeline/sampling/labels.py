"""Classes chosen by name or number."""

from collections.abc import Sequence

from errors import UserError


def find_labels(
    wanted: Sequence[int | str], present: Sequence[int], class_names: Sequence[str] | None
) -> tuple[int, ...]:
    """The labels that `wanted` names, out of those `present`; the word "all" stands for all of these.

    A name is looked up before a number, as classes may be named by other numbers than theirs; its case does not matter.
    Raises UserError, which names the classes that there are, for any other.
    """
    names = {class_names[label].casefold(): label for label in present} if class_names else {}
    known = {str(label): label for label in present} | names
    found: list[int] = []
    for word in map(str, wanted):
        if word.casefold() not in known and word.casefold() != "all":
            choices = ", ".join(f"{label} ({class_names[label]})" if class_names else str(label) for label in present)
            raise UserError(f"there is no class {word!r}: choose from {choices}, or all")
        found += [known[word.casefold()]] if word.casefold() in known else present
    return tuple(found)
