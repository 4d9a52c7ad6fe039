"""The command line of srun: one for each kind of role. Runs on the batch node, with the standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.cluster.slurm_allocation import Allocation


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
        output: file of the tasks' output, `%N` for the node; empty = where srun's own output goes.
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
