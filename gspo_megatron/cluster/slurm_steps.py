"""The command line of srun: one for each kind of role. Runs on the batch node, with the standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.cluster.slurm_allocation import Allocation

SLURM_WORDS = re.compile("srun|slurmstepd")
"""What lines of SLURM itself begin with."""
CONSEQUENCES = re.compile(
    r"(srun|slurmstepd)\S*: (error: (\S+: tasks? |\*\*\*)|Terminating|Job step aborted|[Ff]orc|interrupt|First task|"
    r"cluster configuration lacks support for cpu binding)"
)
"""Lines of SLURM that say that tasks have ended, or of an option of ours that it changes nothing: no reasons."""


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


def reasons(lines: Iterable[str]) -> list[str]:
    """What a step and SLURM have said, without SLURM's lines that only follow from it; all where nothing is left."""
    lines = list(lines)
    return [line for line in lines if line.strip() and not CONSEQUENCES.match(line)] or lines


def log_pattern(directory: Path, name: str) -> str:
    """A file of that directory as srun's --output takes it: in the name `%N` is the node, the directory is as it is.

    There is no pattern for a directory with a backslash: srun then replaces nothing.
    """
    return f"{str(directory).replace('%', '%%')}/{name}"


def srun(
    step: Step, command: Sequence[str], allocation: Allocation, extra: Sequence[str] = (), output: str = ""
) -> list[str]:
    """The srun that runs a command once for each task of a step.

    Everything is given here that srun would take from the site's defaults; what it would take from the environment is
    taken out of that (`slurm_allocation.drop_options`).

    Args:
        step: nodes and tasks.
        command: program and arguments.
        allocation: of the job.
        extra: flags of pyxis and of the site, which come last and so count.
        output: pattern of the files of the tasks' output (`log_pattern`); empty = where srun's own output goes.
    """
    component = allocation.component(step.kind)
    cpus = allocation.cpus[component]
    words = [
        "srun",
        *([f"--output={output}"] if output else []),
        f"--job-name={step.kind}",
        f"--nodes={len(step.hosts)}",
        f"--ntasks={step.tasks}",
        f"--ntasks-per-node={step.each}",
        f"--nodelist={','.join(step.hosts)}",
        *([f"--cpus-per-task={max(1, cpus // step.each)}"] if cpus else []),
        # SLURM refuses more tasks than CPUs otherwise.
        *(["--overcommit"] if 0 < cpus < step.each else []),
        "--mem=0",
        # Every task sees all GPUs of its node and takes its own by number; SLURM would hand out one each, as number 0.
        *([f"--gpus-per-node={allocation.gpus}", "--gpu-bind=none"] if allocation.gpus else []),
        "--cpu-bind=none",
        "--mpi=none",
        "--overlap",
        "--kill-on-bad-exit=1",
        # Without it a site's WaitTime ends the ranks that take longer than the first.
        "--wait=0",
        "--input=none",
        # Otherwise `sbatch --export=NONE` leaves the tasks without PATH.
        "--export=ALL",
    ]
    if allocation.is_heterogeneous:
        words.append(f"--het-group={component}")
    if step.each > 1:
        words.append("--label")
    return [*words, *extra, *command]
