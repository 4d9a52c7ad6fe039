"""The command lines of SLURM: one srun for each kind of role, and what squeue and scontrol answer."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where the tasks of one srun run."""

    kind: str
    """Name of the step: `trainer`, `rollout`, `controller`."""
    hosts: tuple[str, ...]
    """Names of its nodes."""
    each: int = 1
    """Tasks of each node."""

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.each * len(self.hosts)


def srun(step: Step, command: Sequence[str], container: Sequence[str] = (), output: str = "") -> list[str]:
    """The srun that runs a command once for each task of a step.

    srun takes what is not given here from the batch job (SLURM_NTASKS, SLURM_EXPORT_ENV, ...), so everything is given.

    Args:
        step: nodes and tasks.
        command: program and arguments.
        container: flags of pyxis; empty without an image, because srun would not know them.
        output: file of the tasks' output, `%N` for the node; empty = where srun's own output goes.
    """
    cpus, group = _cpus(step.kind)
    words = [
        "srun",
        *([f"--output={output}"] if output else []),
        f"--job-name={step.kind}",
        f"--nodes={len(step.hosts)}",
        f"--ntasks={step.tasks}",
        f"--ntasks-per-node={step.each}",
        f"--nodelist={','.join(step.hosts)}",
        f"--cpus-per-task={max(1, cpus // step.each)}",
        "--overlap",
        "--kill-on-bad-exit=1",
        "--input=none",
        # Otherwise `sbatch --export=NONE` leaves the tasks without PATH.
        "--export=ALL",
    ]
    if group:
        words.append(f"--het-group={group}")
    if step.each > 1:
        words.append("--label")
    return [*words, *container, *command]


def _cpus(kind: str) -> tuple[int, str]:
    """CPUs of a node of the job, and the component of a heterogeneous job that a kind of role runs on."""
    if not is_heterogeneous():
        return _leading_number(os.environ.get("SLURM_CPUS_ON_NODE", "")), ""
    group = "1" if kind == "rollout" else "0"
    return _leading_number(os.environ.get(f"SLURM_JOB_CPUS_PER_NODE_HET_GROUP_{group}", "")), group


def _leading_number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 1


def is_heterogeneous() -> bool:
    """Whether the job has components with nodes of their own."""
    return bool(os.environ.get("SLURM_HET_SIZE"))


def read_command(*words: str) -> str:
    """Standard output of a SLURM command; empty when it fails."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout if done.returncode == 0 else ""


def expand_hosts(folded: str) -> list[str]:
    """`node1`, `node2` for `node[1-2]`."""
    return read_command("scontrol", "show", "hostnames", folded).split()


def describe_job(job: str) -> str:
    """SLURM's record of a job on one line; empty when slurmctld does not answer."""
    return read_command("scontrol", "show", "job", "-o", job)


def running_jobs(user: str) -> list[str]:
    """Ids of a user's jobs that hold nodes."""
    return read_command("squeue", "--noheader", "--states=R,CG", "--format=%A", f"--user={user}").split()
