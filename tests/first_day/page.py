"""The blocks of a page, as a reader takes them: files to write and commands to run, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"^# ([\w.]+)\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code."""

    heading: str
    """The heading that it stands under."""
    name: str
    """Of the file that it is; empty = commands."""
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands, one a line."""
        return [] if self.name else self.text.strip().splitlines()


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page. Raises AssertionError for one that is neither a named file nor commands."""
    found = []
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
        heading = section.partition("\n")[0]
        for language, text in BLOCK.findall(section):
            named = FILE_NAME.match(text)
            assert named or language == "sh", f"{heading}: a block of {language} without the name of its file"
            found.append(Block(heading, named[1] if named and language != "sh" else "", text))
    return found
