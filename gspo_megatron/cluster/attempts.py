"""Which attempt of a run is the newest: an older one, on nodes that were cut off and come back, must not go on."""

from __future__ import annotations

import os
from pathlib import Path

ATTEMPT_FILE = "attempt"
"""File of the run directory: number of its newest attempt, then the job."""
ATTEMPT_VARIABLE = "GSPO_ATTEMPT"
"""Environment of every role of a job: the attempt that it belongs to."""


def replacement(run_dir: Path) -> str | None:
    """One sentence if this attempt is not the run's newest; without attempts (one machine) nothing is checked."""
    mine, fence = os.environ.get(ATTEMPT_VARIABLE), run_dir / ATTEMPT_FILE
    if mine is None or not fence.is_file():
        return None
    newest = fence.read_text().split()[0]
    return f"attempt {mine} was replaced by attempt {newest} of {run_dir}" if int(newest) > int(mine) else None


def refuse_if_replaced(run_dir: Path) -> None:
    """Raise ValueError with that sentence, at the moment before something is published."""
    sentence = replacement(run_dir)
    if sentence is not None:
        raise ValueError(f"{sentence}; its checkpoint is not published")
