"""A JSONL file as objects: one guard around everything that a line can be instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gspo_megatron.config.loading import refuse

_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


class WrittenFloat(float):
    """A number as its file writes it: `str` gives that text (`0.00001`), everything else the number."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Read a number. Raises ValueError for one beyond the range of a float."""
        number = super().__new__(cls, text)
        if not math.isfinite(number):
            raise ValueError(f"{text[:40]} is beyond the range of a number")
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[WrittenFloat], tuple[str]]:
        return WrittenFloat, (self.text,)


def read_objects(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE line N`, object) of every line that is not blank.

    Only a line feed ends a line: JSON texts may hold other separators. A byte order mark and CRLF are read.

    Args:
        path: of the file.
        key: recipe key that names it.

    Raises:
        RecipeError: a missing file, or a line that is no object, with file, line and fault.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path} line {number}"
                raw = raw.removeprefix(_BOM) if number == 1 else raw
                if raw.strip():
                    yield where, read_object(raw, where, key)
    except OSError as error:
        fix = "name a JSONL file, one object a line"
        raise refuse("line-file-missing", key, f"{path} cannot be read ({error.strerror})", fix) from None


def read_object(raw: bytes, where: str, key: str) -> dict[str, Any]:
    """Read one line. Raises RecipeError."""
    try:
        text = raw.decode()
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=WrittenFloat)
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise broken_line(key, where, fault, "save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise broken_line(key, where, f"is not JSON: {error.msg} at column {error.colno}", "fix the line") from None
    except ValueError as error:
        raise broken_line(key, where, f"holds a number that cannot be read: {error}", "write it as a text") from None
    except RecursionError:
        raise broken_line(key, where, "is nested too deeply", "flatten it") from None
    if not isinstance(value, dict):
        raise broken_line(key, where, "is no object", "write {...} on each line")
    # An escape like \ud800 alone is no character: no tokenizer takes it.
    if "\\ud" in text.lower() and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise broken_line(key, where, "holds half of a surrogate pair", "write the character itself")
    return value


def broken_line(key: str, where: str, fault: str, fix: str) -> Exception:
    """Make the RecipeError of one line."""
    return refuse("line-broken", key, f"{where} {fault}", fix)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
