"""The names of attempts and checkpoints in a run directory, and which attempt is the newest.

Names are matched exactly: what a user copies or renames in the run directory is neither read nor deleted. An older
attempt, on nodes that were cut off from the network and come back, must not go on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ATTEMPT_FILE = "attempt"
"""File of the run directory: number of its newest attempt, then the job."""
ATTEMPT_VARIABLE = "GSPO_ATTEMPT"
"""Environment of every role of a job: the attempt that it belongs to."""
COMPLETE = "COMPLETE"
"""File of a checkpoint directory, written last."""


@dataclass(frozen=True)
class Attempt:
    """What the attempt file holds."""

    number: int
    """The newest attempt, from 1."""
    job: str
    """SLURM job that it runs in."""


def checkpoint_name(step: int) -> str:
    """`step_000012`."""
    return f"step_{step:06d}"


def checkpoint_step(name: str) -> int | None:
    """12 for `step_000012`; None for every name that `checkpoint_name` does not give."""
    return _number(name, r"step_(\d+)", checkpoint_name)


def partial_checkpoint_name(step: int, token: str) -> str:
    """`.step_000012.0a1b2c3d.partial`: a checkpoint that is being written; the token is 8 hexadecimal digits."""
    return f".{checkpoint_name(step)}.{token}.partial"


def is_partial_checkpoint(name: str) -> bool:
    """Whether `partial_checkpoint_name` gives this name."""
    return re.fullmatch(r"\.step_\d{6,}\.[0-9a-f]{8}\.partial", name, re.ASCII) is not None


def attempt_name(number: int) -> str:
    """`attempt_3`."""
    return f"attempt_{number}"


def attempt_number(name: str) -> int | None:
    """3 for `attempt_3`; None for every name that `attempt_name` does not give."""
    return _number(name, r"attempt_(\d+)", attempt_name)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a directory, oldest first."""
    steps = {path: checkpoint_step(path.name) for path in _entries(directory)}
    found = [(step, path) for path, step in steps.items() if step is not None and (path / COMPLETE).is_file()]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 without any."""
    found = complete_checkpoints(run_dir / "checkpoints")
    return (checkpoint_step(found[-1].name) or 0) if found else 0


def attempts(logs: Path) -> list[int]:
    """Numbers of the attempts that have a directory under `logs`, oldest first."""
    numbers = (attempt_number(path.name) for path in _entries(logs))
    return sorted(number for number in numbers if number is not None)


def read_attempt(run_dir: Path) -> Attempt | None:
    """The newest attempt of a run; None before the first.

    Raises:
        ValueError: the file is there but does not hold two words, a number and a job.
    """
    file = run_dir / ATTEMPT_FILE
    try:
        text = file.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    match = re.fullmatch(r"(\d{1,9}) (\S+)\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"{file} holds {text[:40]!r}, not the number of an attempt and its job; remove the file")
    return Attempt(int(match[1]), match[2])


def replacement(run_dir: Path) -> str | None:
    """One sentence if this attempt is not the run's newest; without attempts (one machine) nothing is checked.

    A broken attempt file replaces nothing: the supervisor reports it.
    """
    mine = os.environ.get(ATTEMPT_VARIABLE)
    if mine is None:
        return None
    try:
        newest = read_attempt(run_dir)
    except ValueError:
        return None
    if newest is None or newest.number <= int(mine):
        return None
    return f"attempt {mine} was replaced by attempt {newest.number} of {run_dir}"


def refuse_if_replaced(run_dir: Path) -> None:
    """Raise ValueError with that sentence, at the moment before something is published."""
    sentence = replacement(run_dir)
    if sentence is not None:
        raise ValueError(f"{sentence}; its checkpoint is not published")


def _number(name: str, pattern: str, write: Callable[[int], str]) -> int | None:
    match = re.fullmatch(pattern, name, re.ASCII)
    return int(match[1]) if match and len(name) < 40 and write(int(match[1])) == name else None


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
