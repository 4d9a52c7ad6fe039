"""The rows of metrics.jsonl and warnings.jsonl, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_megatron.config.refusal import refuse
from gspo_megatron.run_dir import RunDir


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order of step. Of a step that was run twice the later row counts.

    Raises:
        RecipeError: a line before the last is no row. The last may be cut off by a crash, and does not count.
    """
    return [row for _, row in sorted({row["step"]: row for row in _read(RunDir(run_dir).metrics)}.items())]


def read_warnings(run_dir: Path) -> list[dict[str, Any]]:
    """The warnings of a run in the order in which they were printed: `step`, and the fields of a `Finding`.

    Raises:
        RecipeError: as `read_rows`.
    """
    return _read(RunDir(run_dir).warnings)


def _read(file: Path) -> list[dict[str, Any]]:
    # A run of 0 steps that evaluates nothing records nothing.
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else [""]
    return [_read_row(file, number, line) for number, line in enumerate(lines[:-1], 1)]


def _read_row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise refuse(
            "metrics-damaged", "run.directory",
            f"{file} line {number} is no row of metrics: {line[:40]!r}", "remove the line, or put the file back",
        )  # fmt: skip
    return row
