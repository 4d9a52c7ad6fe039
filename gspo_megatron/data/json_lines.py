"""A file of problems as objects: one guard around everything that a line can be instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gspo_megatron.data.columnar_files import is_columnar, read_columns
from gspo_megatron.data.line_faults import broken_file, broken_line

__all__ = ["HALF_PAIR", "WrittenFloat", "broken_line", "read_object", "read_objects"]

LONGEST_LINE = 1 << 26
"""Bytes of a line; a longer one is no prompt but a file without line feeds."""
PEEKED = 1 << 16
"""Bytes that decide what a text is."""
DEEPEST = 64
"""Objects and lists within each other: what copies and compares a problem calls itself for each."""
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""What is no character, and no tokenizer takes."""
_BOM = b"\xef\xbb\xbf"
_FIX = "name a JSONL, JSON or Parquet file, or a directory that `datasets` saved"


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


class _RepeatedKey(ValueError):
    """An object that has a key twice: readers differ in which of them counts."""


def read_objects(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE line N`, object) of every line that is not blank; rows of Parquet, items of a JSON list.

    The content decides, and not the name. Of a text, only a line feed ends a line: JSON texts may hold other
    separators. A byte order mark and CRLF are read.

    Args:
        path: of the file, or of a directory that `datasets` saved.
        key: recipe key that names it.

    Raises:
        RecipeError: a missing file, or a line that is no object, with file, line and fault.
    """
    try:
        if is_columnar(path):
            yield from read_columns(path, key)
            return
        with path.open("rb") as file:
            start = file.read(PEEKED).removeprefix(_BOM).lstrip()[:1]
            file.seek(0)
            yield from _read_list(path, key) if start == b"[" else _read_lines(file, path, key)
    except OSError as error:
        raise broken_file(key, f"{path} cannot be read ({error.strerror})", _FIX) from None


def _read_lines(file: BinaryIO, path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path} line {number}"
        if len(raw) > LONGEST_LINE:
            fault = f"has more than {LONGEST_LINE >> 20} MiB"
            raise broken_line(key, where, fault, "write one problem a line, each ended by a line feed")
        raw = raw.removeprefix(_BOM) if number == 1 else raw
        if raw.strip():
            yield where, read_object(raw, where, key)


def _read_list(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    items = _read_value(path.read_bytes().removeprefix(_BOM), str(path), key)
    for number, item in enumerate(items, start=1):
        yield f"{path} item {number}", _need_object(item, f"{path} item {number}", key)


def read_object(raw: bytes, where: str, key: str) -> dict[str, Any]:
    """Read one line. Raises RecipeError."""
    return _need_object(_read_value(raw, where, key), where, key)


def _read_value(raw: bytes, where: str, key: str) -> Any:
    """Read a JSON text. Raises RecipeError."""
    try:
        text = raw.decode()
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=WrittenFloat, object_pairs_hook=_make_object
        )
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise broken_line(key, where, fault, "save it as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise broken_line(key, where, f"is not JSON: {error.msg} at {place}", "fix the line") from None
    except _RepeatedKey as error:
        raise broken_line(key, where, f"has the key {error} twice", "keep one of them") from None
    except ValueError as error:
        raise broken_line(key, where, f"holds a number that cannot be read: {error}", "write it as a text") from None
    except RecursionError:
        raise broken_line(key, where, "is nested too deeply", "flatten it") from None
    _check_depth(value, where, key)
    # An escape like \ud800 alone is no character: no tokenizer takes it.
    if "\\ud" in text.lower() and HALF_PAIR.search(json.dumps(value, ensure_ascii=False)):
        raise broken_line(key, where, "holds half of a surrogate pair", "write the character itself")
    return value


def _need_object(value: object, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise broken_line(key, where, "is no object", "write {...} on each line")
    return value


def _check_depth(value: Any, where: str, key: str) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        level = [item for one in level if isinstance(one, dict | list)
                 for item in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if not level:
            return
    raise broken_line(key, where, f"is nested too deeply (more than {DEEPEST})", "flatten it")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(repr(next(name for name in names if names.count(name) > 1))[:60])
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
