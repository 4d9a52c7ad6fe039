"""A metric sink in its own file: one line `step,name,value` per number, appended over all attempts.

gspo train RECIPE metrics.sinks=recipes/sinks/csv_rows.py:CsvRows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspo_megatron.sinks.sink_protocol import SinkRun


class CsvRows:
    """Writes RUN_DIR/sinks/CsvRows/rows.csv."""

    def __init__(self, run: SinkRun) -> None:
        self._file = (run.directory / "rows.csv").open("a")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append the numbers of a step."""
        self._file.writelines(f"{step},{name},{value}\n" for name, value in row.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
