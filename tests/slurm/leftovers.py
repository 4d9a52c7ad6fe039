"""What jobs that have ended must not leave: a job in the queue, a process, a key, a file of one node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.slurm.jobs import Workplace
from tests.slurm.lab.cluster import LabError, wait_for

ALLOWED = ("gspo-root", "gspo-nobody", "here", "hold", "packages-of-", "tokenizer-of-", "venv-of-")
"""Names on a node: the one place of ours (launch/SITES.md: caches), and files of the tests."""
GONE = 180.0
"""Seconds until SLURM has ended what was cancelled; a second on a quiet machine."""


def check_nothing_left(place: Workplace) -> None:
    """Wait until all is gone. Raises AssertionError that names what is not."""
    try:
        wait_for(lambda: not find_leftovers(place), GONE, "end of what jobs have left", pause=0.25)
    except LabError:
        left = find_leftovers(place)
        assert not left, "\n".join(left)


def find_leftovers(place: Workplace) -> list[str]:
    """One line each. Jobs that a module keeps running, and their nodes' files, are left out."""
    queued = set(place.lab.run("squeue", "--noheader", "--format=%A").stdout.split())
    ended = [job for job in place.jobs if job.id not in place.kept]
    found = [f"job {job.id} is queued or runs" for job in ended if str(job.id) in queued]
    found += _find_processes(place, {str(job.id) for job in ended})
    # A directory may have been taken over by a job that runs.
    alive = {job.run_dir for job in place.jobs if str(job.id) in queued}
    found += [str(key) for job in ended if job.run_dir not in alive for key in job.run_dir.glob("logs/attempt_*/key")]
    return found if queued else [*found, *_find_files(place)]


def _find_processes(place: Workplace, ended: set[str]) -> Iterator[str]:
    """Everything that a job has started has its number in its environment."""
    cluster = f"SLURM_CONF={place.lab.environment['SLURM_CONF']}".encode()
    numbers = {f"SLURM_JOB_ID={number}".encode() for number in ended}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = set(path.joinpath("environ").read_bytes().split(b"\0"))
            if cluster in variables and variables & numbers:
                yield f"process {path.name}: {path.joinpath('cmdline').read_text().replace(chr(0), ' ')[:200]}"


def _find_files(place: Workplace) -> Iterator[str]:
    for number in range(1, place.lab.nodes + 1):
        try:
            on = place.lab.on(f"node{number}")
            listed = place.lab.run(*on, "find", "/tmp", "/dev/shm", "-mindepth", "1", "-maxdepth", "1").stdout
        except LabError:
            # It has no power.
            continue
        shared = {Path(path).parts[2] for path in place.lab.environment["LAB_SHARED"].split(":") if path}
        for name in (Path(line) for line in listed.splitlines()):
            if not name.name.startswith(ALLOWED) and name.name not in shared:
                yield f"node{number}: {name}"
