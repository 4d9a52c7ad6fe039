"""What scontrol and squeue answer. Runs on the batch node, with the standard library only."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress


def read_command(*words: str, timeout: float | None = None) -> str:
    """Standard output of a SLURM command; empty when it fails, or takes more than so many seconds."""
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


NO_VALUE = ("(null)", "N/A", "None", "UNLIMITED", "Partition_Limit", "Unknown")
"""A record has these where there is no value."""


def expand_hosts(folded: str) -> list[str]:
    """`node1`, `node2` for `node[1-2]`."""
    return read_command("scontrol", "show", "hostnames", folded).split()


def describe_job(job: str, timeout: float | None = None) -> str:
    """SLURM's record of a job, one line for each component; empty when slurmctld does not answer."""
    return read_command("scontrol", "show", "job", "-d", "-o", job, timeout=timeout)


def read_field(record: str, name: str) -> str:
    """A field of a job's record; empty where it is absent, or SLURM has no value for it."""
    match = re.search(rf"(?:^|\s){name}=(\S+)", record)
    return match[1] if match and match[1] not in NO_VALUE else ""


def is_ending(record: str) -> bool:
    """Whether SLURM is ending a job, or has queued it again."""
    return read_field(record, "JobState") not in ("", "RUNNING", "SUSPENDED")


def is_preempted(record: str) -> bool:
    """Whether a job that runs must make room for another one; SLURM ends it after the partition's GraceTime."""
    return not is_ending(record) and bool(read_field(record, "PreemptTime"))


def running_jobs() -> list[str]:
    """Ids of the jobs that hold nodes, of every user that squeue shows: a run directory may be shared."""
    return read_command("squeue", "--noheader", "--states=R,CG,S", "--format=%A").split()
