"""The rows of metrics.jsonl and warnings.jsonl, read back, also while they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gspo_megatron.cluster.shared_files import retry_stale
from gspo_megatron.config.refusal import refuse
from gspo_megatron.run_dir import RunDir

BLANKS = " \t\r\ufeff"
"""What an editor leaves in a line without a row, the mark of an encoding included."""


class RowReader:
    """The rows of a file that grows: each call reads what is new. A file that was replaced or cut is read anew."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._forget()

    def _forget(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._end, self._lines, self._identity = 0, 0, (0, 0)

    def read(self) -> list[dict[str, Any]]:
        """All rows so far, in the order of the file.

        Raises:
            RecipeError: a line before the last is no row. The last may be cut off by a crash, and does not count.
        """
        # A run of 0 steps that evaluates nothing records nothing.
        if not retry_stale(self._file.is_file):
            self._forget()
            return []
        new = retry_stale(self._read_new)  # may forget the rows so far
        self._rows += new
        return list(self._rows)

    def _read_new(self) -> list[dict[str, Any]]:
        with self._file.open("rb") as file:
            found = self._file.stat()
            if (found.st_dev, found.st_ino) != self._identity or found.st_size < self._end:
                self._forget()
                self._identity = (found.st_dev, found.st_ino)
            file.seek(self._end)
            whole, end, _ = file.read().rpartition(b"\n")
        lines = whole.decode("utf-8", "replace").split("\n") if end else []
        numbered = list(enumerate(lines, self._lines + 1))
        rows = [_read_row(self._file, number, line) for number, line in numbered if line.strip(BLANKS)]
        self._lines += len(lines)
        self._end += len(whole) + len(end)
        return rows


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order of step. Of a step that was run twice the later row counts.

    Raises:
        RecipeError: as `RowReader.read`.
    """
    return by_step(RowReader(RunDir(run_dir).metrics).read())


def by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in order of step, the later one of a step."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def read_warnings(run_dir: Path) -> list[dict[str, Any]]:
    """The warnings of a run in the order in which they were printed: `step`, and the fields of a `Finding`.

    Raises:
        RecipeError: as `RowReader.read`.
    """
    return RowReader(RunDir(run_dir).warnings).read()


def _parse_slowly(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = from_json(line.strip(BLANKS))
    except ValueError:  # or half of a surrogate pair, which this parser refuses
        row = _parse_slowly(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise refuse(
            "metrics-damaged", "run.directory",
            f"{file} line {number} is no row of metrics: {line[:40]!r}", "remove the line, or put the file back",
        )  # fmt: skip
    return row
