"""What a recipe that cannot be used raises."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gspo_megatron.types import Finding

_LONGEST = 60


class RecipeError(ValueError):
    """A recipe that cannot be used; `findings` holds one entry per fault."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(str(finding) for finding in findings))
        self.findings = tuple(findings)


def refuse(code: str, key: str, message: str, fix: str) -> RecipeError:
    """Make a `RecipeError` of one finding."""
    return RecipeError([Finding(code, "error", key, message, fix)])


def quote(value: object) -> str:
    """Return a value for an error sentence: printable, on one line, at most 60 characters."""
    # As a recipe has them: `true` and `null`, not `True` and `None`.
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def key_text(parts: Sequence[str]) -> str:
    """Return the dotted key for an error sentence; empty, unprintable or very long ones are quoted or cut."""
    key = ".".join(parts)
    return key if (key.isprintable() and 0 < len(key) <= 2 * _LONGEST) or not parts else quote(key)
