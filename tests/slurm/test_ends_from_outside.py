"""Ends that are not the run's fault, and other clusters: with cheap roles, four jobs at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.slurm.jobs import CHEAP, END, LAST, ROOT, SCRIPT, SMALL, TINY, Job, Workplace, make_run, refused
from tests.slurm.lab.cluster import LabError, wait_for
from tests.slurm.leftovers import check_nothing_left

pytestmark = pytest.mark.timeout(900)
LONG = 120
"""Steps of 0.2 s: long enough for another job to come meanwhile."""
PREEMPTED = {
    "grace_before": ("patient", 0),
    "grace_after": ("patient", 4),
    "at_once_before": ("spare", 0),
    "at_once_after": ("spare", 4),
}
"""Partition, and steps between two checkpoints (0 = none)."""


@pytest.fixture(scope="module")
def preempted(workplace: Workplace) -> Iterator[dict[str, Job]]:
    """A job on each of four nodes, each of which another job wants after some steps."""
    jobs = {}
    for number, (name, (partition, every)) in enumerate(PREEMPTED.items(), start=1):
        options = [f"--partition={partition}", "--nodes=1", f"--nodelist=node{number}"]
        overrides = (f"checkpoint.every={every}", f"trainer.max_steps={LONG}")
        jobs[name] = workplace.cheap(name, *overrides, options=options)
    for number, job in enumerate(jobs.values(), start=1):
        wait_for(lambda job=job: len(job.steps()) > 5, END, f"steps of {job.run_dir.name}: {job.text()}")
        urgent = (
            "--partition=urgent",
            "--exclusive",
            f"--nodelist=node{number}",
            "--output=/dev/null",
            "--wrap=sleep 1",
        )
        workplace.lab.submit(*urgent)
    with workplace.keeping(jobs.values()):
        yield jobs
    check_nothing_left(workplace)


@pytest.mark.parametrize("name", PREEMPTED)
def test_a_preempted_run_comes_to_done_and_counts_no_restart(name: str, preempted: dict[str, Job]) -> None:
    job, (partition, every) = preempted[name], PREEMPTED[name]
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert not (job.run_dir / "logs" / "restarts").exists() and job.lab.job(job.id)["Restarts"] == "1"
    rows = job.rows()
    first = [row["step"] for row in rows if row["attempt"] == "1"]
    second = [row["step"] for row in rows if row["attempt"] == "2"]
    assert first == list(range(1, len(first) + 1)) and second == list(range(second[0], LONG + 1))
    # Within the grace the step is finished and saved; at once at most the steps since the last checkpoint are lost.
    kept, saved = second[0] - 1, first[-1] // every * every if every else 0
    assert kept == first[-1] if partition == "patient" else saved <= kept <= first[-1], (first, second)
    if partition == "patient":
        assert f"gspo: attempt 1 stopped as asked; step {kept} is checkpointed" in job.text()
    assert not list(job.run_dir.glob("logs/attempt_*/key"))


def test_a_job_that_is_preempted_while_it_starts_is_queued_again(workplace: Workplace) -> None:
    # A probe of the preflight is a step too, and gets the signal.
    lab, place = workplace.lab, workplace.directory / "tools_that_wait"
    place.mkdir()
    (place / "dcgmi").write_text(f"#!/bin/bash\ntouch {place}/asked\nsleep 15\n")
    (place / "dcgmi").chmod(0o755)
    options = ["--partition=patient", "--nodes=1", "--nodelist=node5"]
    path = f"{place}:{os.environ['PATH']}"
    job = workplace.cheap("start", "trainer.max_steps=3", options=options, PATH=path)
    wait_for((place / "asked").exists, END, "preflight")
    urgent = ("--partition=urgent", "--exclusive", "--nodelist=node5", "--output=/dev/null", "--wrap=sleep 1")
    lab.submit(*urgent)
    job.wait_for_attempt(2, END)
    (place / "dcgmi").unlink()
    assert job.finish(END) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.everything()
    assert not (job.run_dir / "logs" / "restarts").exists()


def test_of_two_jobs_that_start_in_one_second_one_runs(workplace: Workplace) -> None:
    logs = [workplace.directory / f"pair{number}.log" for number in range(2)]
    jobs = [workplace.cheap("pair", "trainer.max_steps=4", options=["--nodes=1", f"--output={log}"]) for log in logs]
    states = sorted(job.finish(END) for job in jobs)
    said = [log.read_text() for log in logs]
    # Where one was done before the other started, that one says so.
    late = [text for text in said if "holds a finished run (DONE)" in text]
    refusals = [text for text in said if f"is running in {workplace.directory}/pair; wait for it" in text]
    assert states == (["COMPLETED", "COMPLETED"] if late else ["COMPLETED", "FAILED"]), said
    assert len(late) + len(refusals) == 1 and jobs[0].steps() == [1, 2, 3, 4], said


def test_a_run_of_another_user_is_not_taken_over(workplace: Workplace) -> None:
    lab, run_dir = workplace.lab, make_run(workplace.directory / "theirs")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    said = lab.run(*nobody, "sbatch", "--parsable", "--output=/dev/null", "--chdir=/", "--wrap=sleep 600").stdout
    holder = said.strip()
    lab.wait(int(holder), END, ("RUNNING",))
    (run_dir / "logs" / "attempt_1").mkdir(parents=True)
    (run_dir / "logs" / "attempt_1" / "job").write_text(holder)
    (run_dir / "logs" / "attempt_1" / "key").write_text("theirs")
    job = workplace.cheap("theirs", options=["--nodes=1"])
    assert f"job {holder} is running in {run_dir}" in refused(job) and "--dependency=singleton" in job.text()
    assert (run_dir / "logs" / "attempt_1" / "key").read_text() == "theirs"
    (run_dir / "logs" / "attempt_1" / "key").unlink()
    lab.run("scancel", holder)


def test_a_shell_of_salloc_runs_on_the_granted_gpus(workplace: Workplace) -> None:
    run_dir = workplace.directory / "salloc"
    words = ["--nodes=1", "--gpus-per-node=2", str(ROOT / SCRIPT), TINY, *SMALL, "placement.gpu=h100"]
    settings = {"GSPO_SITE": "/dev/null", "GSPO_VENV": sys.prefix, "PYTHONPATH": str(CHEAP)}
    done = workplace.lab.run(
        "salloc", *words, f"run.directory={run_dir}", environment=settings, cwd=ROOT, check=False
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "nvidia-smi lists 0 GPUs where SLURM granted 2" in said, said
    assert "1 with 2 GPUs each" in said and " --gpus-per-node=2 " in said.partition("resume ")[2], said


def test_a_site_without_gpu_gres_and_without_requeue_goes_on_with_afterany(bare: Workplace) -> None:
    with pytest.raises(LabError, match="Invalid generic resource"):
        bare.cheap("plain", options=["--nodes=1"])
    options = ["--nodes=1", "--gpus-per-node=0", "--no-requeue"]
    first = bare.cheap("chain", f"trainer.max_steps={LAST}", options=options)
    after = [*options, f"--dependency=afterany:{first.id}", f"--output={bare.directory}/second.log"]
    second = bare.cheap("chain", f"trainer.max_steps={LAST}", options=after)
    first.wait_for_step(1, END)
    bare.lab.run("scancel", "--batch", "--signal=USR1", str(first.id))
    assert first.finish(END) == "FAILED" and first.exit_code() == 85, first.everything()
    resume = first.text().partition("resume ")[2].splitlines()[0]
    assert " --gpus-per-node=0 " in resume and " --no-requeue " in resume
    assert "does not queue this job again" in first.text()
    assert second.finish(END) == "COMPLETED" and (second.run_dir / "DONE").exists(), second.everything()
    assert second.steps() == list(range(1, LAST + 1))
