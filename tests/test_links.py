"""What the documents link to is there, down to the heading, and every picture of theirs is shown."""

import re

import pytest
from helpers import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "pretrained" / "README.md"]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def linked(document):
    """The files that a document links to, each with an anchor, which may be empty."""
    for place, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        yield (document.parent / place).resolve() if place else document, anchor


def anchors(document):
    """Those that GitHub makes of the headings of a document."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    broken = [
        f"{path.relative_to(ROOT)}#{anchor}"
        for path, anchor in linked(document)
        if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert not broken


def test_every_picture_is_shown():
    shown = {path for document in DOCUMENTS for path, _ in linked(document)}
    assert set((ROOT / "docs").glob("*.png")) <= shown
