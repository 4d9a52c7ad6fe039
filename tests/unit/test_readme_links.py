"""Relative links of the documentation lead to files and headings; files and names in its text are there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.places import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
GUIDE = re.compile(r"^## Add an? .*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
WORD = re.compile(r"[\w./-]+")
THEIRS = {"file.py", "my.py", "my_reward.py", "my_rendering.py", "site.sh"}
"""Names that a text gives to files of the reader."""
FOLDERS = ("gspo_megatron", "launch", "recipes", "requirements", "tests", "tools")


def documents() -> list[Path]:
    """Every Markdown file at the top and in the folders of the repository."""
    return sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])


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


@cache
def sources() -> dict[str, str]:
    """Path -> text of every Python file and script of the repository."""
    found = [path for folder in FOLDERS for end in ("py", "sh") for path in (ROOT / folder).rglob(f"*.{end}")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found}


def missing_files(text: str) -> list[str]:
    """Python files and scripts that a text names, and that are nowhere; a name in capitals is to be replaced."""
    words = [word for span in re.findall(r"`([^`\n]+)`", CODE_BLOCK.sub("", text)) for word in WORD.findall(span)]
    named = [word.lstrip("./") for word in words if re.search(r"\w\.(py|sh)$", word)]
    return [
        name for name in named
        if name not in THEIRS and Path(name).name not in THEIRS and not re.search(r"(^|/)[A-Z]+(/|\.)", name)
        and not any(f"/{place}".endswith(f"/{name}") for place in sources())
    ]  # fmt: skip


def missing_names(text: str) -> list[str]:
    """Constants and functions that a text names in code marks, and that stand in no source."""
    names = [name for name in re.findall(r"`(\w+)`", text) if "_" in name.strip("_")]
    return [name for name in names if not any(re.search(rf"\b{name}\b", source) for source in sources().values())]


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


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_text_names_are_there(document: Path) -> None:
    """NOTES.md tells of its day: what it names may be gone."""
    assert document.name == "NOTES.md" or missing_files(document.read_text()) == []


def test_names_in_the_guides_are_those_of_the_code() -> None:
    guides = {path: "".join(GUIDE.findall(path.read_text())) for path in documents()}
    assert sum(text.count("## Add") for text in guides.values()) > 8
    assert {path: missing for path, text in guides.items() if (missing := missing_names(text))} == {}


def test_a_missing_file_and_a_missing_name_are_found() -> None:
    text = "`registry.py` `models/registry.py` `models/gone.py` `models/NAME/costs.py` `file.py:NAME` `launch/gone.sh`"
    assert missing_files(text) == ["models/gone.py", "launch/gone.sh"]
    assert missing_names("`FAMILIES" + "_GONE` `BUILT_IN` `metric_sums` `word`") == ["FAMILIES_" + "GONE"]
