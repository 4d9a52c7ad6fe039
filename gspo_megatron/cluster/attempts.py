"""Which attempt of a run is the newest, and how far the run is.

An older attempt, on nodes that were cut off from the network and come back, must not go on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.cluster.shared_files import read_shared, retry_stale
from gspo_megatron.run_dir import CHECKPOINT, AttemptDir, CheckpointDir, RunDir, complete_checkpoints

ATTEMPT_VARIABLE = "GSPO_ATTEMPT"
"""Environment of every role of a job: the attempt that it belongs to."""


NODE_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._,\[\]-]*)(\s.*)?", re.ASCII)
"""Of `logs/bad_nodes`."""
STATE_KEYS = (
    "step", "version", "updates", "skipped", "optimizer_steps", "objective", "controller", "layout", "files",
)  # fmt: skip
"""What the state of a checkpoint holds; trainer/checkpoint.py writes it."""


@dataclass(frozen=True)
class Attempt:
    """What the attempt file holds."""

    number: int
    """The newest attempt, from 1."""
    job: str
    """SLURM job that it runs in."""
    place: str = ""
    """Directory that this was written in (`name_place`); empty of an earlier version's."""


def name_place(run_dir: Path) -> str:
    """What tells a directory from its copies: number of its inode, and path."""
    return f"{run_dir.stat().st_ino} {os.path.realpath(run_dir)}"


def is_copied(run_dir: Path, place: str) -> bool:
    """Whether what was written in another directory has come here with a copy of it.

    A directory that was moved, or that has other names on other nodes, has the number of its inode still; one whose
    file system numbers anew at each mount has its path.
    """
    number, _, path = place.partition(" ")
    mine = name_place(run_dir).partition(" ")
    return bool(place) and number != mine[0] and path != mine[2]


def write_job(attempt: Path, run_dir: Path, job: str) -> None:
    """Record the SLURM job of an attempt."""
    AttemptDir(attempt).job.write_text(f"{job} {name_place(run_dir)}")


def read_jobs(run_dir: Path, attempts: Iterable[Path]) -> list[str]:
    """SLURM jobs of attempts, without those that a copy has brought, which belong to the run that was copied."""
    files = [file for attempt in attempts if (file := AttemptDir(attempt).job).is_file()]
    records = [read_shared(file).strip().partition(" ") for file in files]
    return [job for job, _, place in records if not is_copied(run_dir, place)]


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint of a run that can be resumed from; 0 without any."""
    found, _ = find_checkpoint(RunDir(run_dir).checkpoints)
    return 0 if found is None else CHECKPOINT.parse(found.name) or 0


def find_checkpoint(
    directory: Path, inspect: Callable[[Path], str | None] = lambda _: None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that can be resumed from, and what is wrong with those that are newer.

    Args:
        directory: `checkpoints` of the run directory.
        inspect: says what else is wrong with one, or None.
    """
    faults: dict[Path, str] = {}
    for checkpoint in reversed(retry_stale(lambda: complete_checkpoints(directory))):
        fault = checkpoint_fault(checkpoint) or inspect(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults[checkpoint] = fault
    return None, faults


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a complete checkpoint cannot be resumed from, or None: its state is read, its files have their sizes."""
    file = CheckpointDir(checkpoint).state
    try:
        state = json.loads(retry_stale(lambda: file.read_text(encoding="utf-8")))
        step, sizes = state["step"], state["files"]
        lacking = [key for key in STATE_KEYS if key not in state]
        if lacking or not sizes or step != CHECKPOINT.parse(checkpoint.name):
            why = f"it has no {lacking[0]}" if lacking else f"its step is {step}, of {len(sizes)} files"
            return f"{file.name} is not the state of {checkpoint.name}: {why}"
        for name, size in sizes.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
    except OSError as error:
        return f"{Path(error.filename or file).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return f"{file.name} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    return None


def read_attempt(run_dir: Path) -> Attempt | None:
    """The newest attempt of a run; None before the first.

    Raises:
        ValueError: the file is there but cannot be read, or does not hold a number, a job and a directory.
    """
    file = RunDir(run_dir).attempt
    try:
        text = read_shared(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); remove it") from None
    match = re.fullmatch(r"(\d+) (\S+)(?: (\d+ .+))?\s*", text, re.ASCII | re.DOTALL)
    if match is None:
        raise ValueError(f"{file} holds {text[:40]!r}, not the number of an attempt and its job; remove the file")
    return Attempt(int(match[1]), match[2], (match[3] or "").rstrip("\n"))


def read_bad_nodes(run_dir: Path) -> list[str]:
    """Nodes that no attempt of a run may use, as SLURM writes names: people add `node[3-4] reason`, or `node3` alone.

    A line that does not begin with a name is theirs.
    """
    file = RunDir(run_dir).bad_nodes
    lines = read_shared(file).splitlines() if retry_stale(file.is_file) else []
    found = [match[1] for line in lines if (match := NODE_LINE.fullmatch(line))]
    return list(dict.fromkeys(found))


def count_restarts(run_dir: Path) -> int:
    """Restarts of a run after crashes, over all attempts; 0 where nobody has recorded any."""
    file = RunDir(run_dir).restarts
    return len(read_shared(file).splitlines()) if retry_stale(file.is_file) else 0


def remove_key(attempt: Path) -> None:
    """Take the key away; without it nothing can be asked of what may still run."""
    try:
        AttemptDir(attempt).key.unlink(missing_ok=True)
    except OSError as error:
        print(f"gspo: {AttemptDir(attempt).key} cannot be removed ({error.strerror}); remove it", flush=True)


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
