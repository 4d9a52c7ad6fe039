"""Relative links of the documentation lead to files, and to headings where they name one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.places import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Every Markdown file at the top and in the folders of the repository."""
    folders = ("gspo_megatron", "launch", "recipes", "requirements", "tests", "tools")
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """The relative links of a document that lead nowhere."""
    found = []
    for target in LINK.findall(CODE_BLOCK.sub("", document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = document.parent / name if name else document
        if not place.exists() or (anchor and anchor not in anchors(place.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# Add a reward\n")
    text = (
        "[a](there.md) [b](gone.md) [c](there.md#add-a-reward) [d](there.md#add-a-fee) [e](https://x.org) ![f](no.svg)"
    )
    (tmp_path / "README.md").write_text(text + "\n```\n[g](inside-code.md)\n```\n")
    assert broken_links(tmp_path / "README.md") == ["gone.md", "there.md#add-a-fee", "no.svg"]
