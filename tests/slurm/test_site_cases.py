"""Sites that differ, as one table: each case is a job with cheap roles, and what it must come to.

All jobs are submitted at once, on nodes of their own where they have any; SLURM queues them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.jobs import END, Job, Workplace, refused

pytestmark = pytest.mark.timeout(900)
STEPS = "trainer.max_steps=4"
GPU_RUN = ("placement.gpu=h100", "trainer.ranks=2", STEPS)
NVIDIA_SMI = """#!/bin/bash
for index in 0 1; do
    case $* in
    *memory.used*) echo "GPU-$index, NVIDIA H100 80GB HBM3, 580.1, 4" ;;
    *uuid,name*) echo "GPU-$index, NVIDIA H100 80GB HBM3" ;;
    *uuid*) echo "GPU-$index" ;;
    esac
done
"""


def comes_to_done(job: Job) -> None:
    """Finished, each step once."""
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert job.steps() == [1, 2, 3, 4]
    assert not list(job.run_dir.glob("logs/attempt_*/key"))


def is_refused(*words: str) -> Callable[[Job], None]:
    """Refused with these words in its log."""

    def check(job: Job) -> None:
        said = refused(job)
        for part in words:
            assert part in said, said

    return check


def sees(**expected: str) -> Callable[[Job], None]:
    """Finished, and both ranks saw this in their environment."""

    def check(job: Job) -> None:
        comes_to_done(job)
        found = [{name: facts[name] for name in expected} for facts in job.seen()]
        assert found == [expected, expected], job.seen()

    return check


@dataclass(frozen=True)
class Case:
    """A job."""

    check: Callable[[Job], None]
    options: Sequence[str] = ()
    overrides: Sequence[str] = (STEPS,)
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: bool = False
    """Whether nvidia-smi lists two GPUs on every node."""


CASES = {
    "GPUs that nobody names": Case(
        is_refused("[no-gpus] placement.gpu: SLURM names no GPUs of this job", "GSPO_GPUS_PER_NODE"),
        ["--gpus-per-node=0"], GPU_RUN,
    ),
    "GPUs that only nvidia-smi lists": Case(
        sees(CUDA_VISIBLE_DEVICES="0,1"), ["--gpus-per-node=0"], GPU_RUN, {"CUDA_VISIBLE_DEVICES": "0,1"}, gpus=True
    ),
    "GPUs that only the site names": Case(
        is_refused("1 with 2 GPUs each", "nvidia-smi lists 0 GPUs where"), ["--gpus-per-node=0"], GPU_RUN,
        {"GSPO_GPUS_PER_NODE": "2"},
    ),
    "no kind of GPU in the recipe and none granted": Case(
        is_refused("[no-gpus]"), ["--gres=none", "--gpus-per-node=0"], ("placement.gpu=null", STEPS)
    ),
    "a GPU for each task": Case(
        sees(CUDA_VISIBLE_DEVICES="0,1"), ["--gpus-per-node=2", "--ntasks-per-node=2", "--gpus-per-task=1"], GPU_RUN,
        gpus=True,
    ),
    "a GPU bound to each task": Case(
        sees(CUDA_VISIBLE_DEVICES="0,1"), ["--gpus-per-node=2"], GPU_RUN, {"SLURM_GPU_BIND": "single:1"}, gpus=True
    ),
    "options of srun in the user's shell": Case(
        comes_to_done, [], (STEPS,),
        {"SLURM_MPI_TYPE": "pmix", "SLURM_WAIT": "1", "SLURM_DISTRIBUTION": "plane=3", "SLURM_EXACT": "1",
         "SLURM_IMMEDIATE": "1", "SLURM_LABELIO": "1", "SLURM_NTASKS_PER_CORE": "1", "SLURM_OPEN_MODE": "t",
         "SLURM_STDOUTMODE": "none", "SLURM_WORKING_DIR": "/nowhere", "SQUEUE_PARTITION": "none"},
    ),
    "pmi2 as the site wants it": Case(
        sees(SLURM_MPI_TYPE="pmi2"), environment={"GSPO_SRUN_ARGS": "--mpi=pmi2 --comment='two words'"}
    ),
    "quotes that do not close": Case(
        is_refused("GSPO_SRUN_ARGS=--comment='two cannot be read (No closing quotation)"),
        environment={"GSPO_SRUN_ARGS": "--comment='two"},
    ),
    "threads and tasks of another job": Case(
        comes_to_done, ["--ntasks-per-node=3", "--cpus-per-task=2", "--threads-per-core=1", "--hint=nomultithread"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(workplace: Workplace) -> Iterator[dict[str, Job]]:
    tools = workplace.directory / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(NVIDIA_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    yield {name: submit(workplace, f"case{number}", case, tools) for number, (name, case) in enumerate(CASES.items())}
    workplace.cancel_all()


def submit(place: Workplace, name: str, case: Case, tools: Path) -> Job:
    path = (
        f"{tools}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        if case.gpus
        else "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    )
    return place.cheap(
        name, *case.overrides, options=["--nodes=1", *case.options], **{"PATH": path, **case.environment}
    )


@pytest.mark.parametrize("name", CASES)
def test_a_job_of_another_site(name: str, jobs: dict[str, Job]) -> None:
    CASES[name].check(jobs[name])
