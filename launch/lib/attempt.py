"""Files of an attempt that the job script itself writes: who holds the run directory, and the job's key."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from gspo_megatron.cluster.attempts import name_place, remove_key
from gspo_megatron.cluster.shared_files import replace_text, retry_stale
from gspo_megatron.cluster.slurm_commands import await_answer, running_jobs
from gspo_megatron.directory_lock import take_lock
from gspo_megatron.run_dir import ATTEMPT, AttemptDir, RunDir
from launch.lib.plan_request import Plan, Refused

T = TypeVar("T")


def claim_attempt(plan: Plan, job: str, is_first: bool = True) -> BinaryIO | None:
    """Make this the newest attempt of its run, after which older ones end.

    The attempt's directory was made exclusively, so of two jobs that start in the same second the one with the higher
    number sees the other here.

    Args:
        plan: of the attempt.
        job: this one.
        is_first: whether this is the first start of its job.

    Returns:
        What holds the run directory as long as it is open (`hold_run`).

    Raises:
        Refused: a job with an older attempt of the run is running, or another process holds the run directory.
    """
    running = set(wait_for_slurm(running_jobs)) - {job}
    holder = next((other for other in plan.earlier_jobs if other in running), None)
    if holder is not None:
        shutil.rmtree(plan.attempt, ignore_errors=True)
        raise Refused("run.directory: {}; {}".format(*in_use(plan.run_dir, holder)))
    try:
        lock = hold_run(RunDir(plan.run_dir), is_first)
    except Refused:
        shutil.rmtree(plan.attempt, ignore_errors=True)
        raise
    newest = RunDir(plan.run_dir).attempt
    try:
        replace_text(newest, f"{plan.number} {job} {name_place(plan.run_dir)}\n")
    except OSError as error:
        raise Refused(f"{newest} cannot be written ({error.strerror}); remove it") from None
    for number, path in ATTEMPT.find(RunDir(plan.run_dir).logs).items():
        if number < plan.number:
            # Whoever made a key removes it, unless its node lost power. Not before it is sure that nobody needs it.
            remove_key(path)
    latest = RunDir(plan.run_dir).latest
    if latest.exists() and not latest.is_symlink():
        print(f"gspo: {latest} is not ours and stays; the newest attempt is {plan.attempt}", flush=True)
        return lock
    fresh = latest.with_name(f".{latest.name}.{os.getpid()}")
    fresh.symlink_to(plan.attempt.name)
    fresh.replace(latest)
    return lock


def hold_run(run: RunDir, is_first: bool) -> BinaryIO | None:
    """Take the lock of a run directory, which `gspo train` takes too: SLURM knows neither that, nor jobs of another
    cluster, nor which of two scripts in one allocation holds it.

    A job that was queued again takes over also from its own attempt on a node that is cut off. Null = not held: that,
    or a file system without locks.

    Raises:
        Refused: another process holds it.
    """
    try:
        return take_lock(run.path)
    except BlockingIOError:
        if is_first:
            raise Refused(
                f"run.directory: another script writes {run.path} now, which SLURM here does not name (a second one in "
                "this allocation, a job of another cluster, or launch/local.sh); wait until it has ended"
            ) from None
    except OSError:  # a run of an earlier version has no mark
        pass
    return None


def in_use(run_dir: Path, holder: str) -> tuple[str, str]:
    """What is wrong with a run directory that another job is using, and what to do."""
    if os.environ.get("SLURM_ARRAY_JOB_ID"):
        return (
            f"job {holder} is running in {run_dir}: all tasks of --array have the same run.directory",
            "let one follow the other (--array=0-3%1), or leave run.directory out, which gives each task its own",
        )
    return (
        f"job {holder} is running in {run_dir}",
        f"wait for it (sbatch --dependency=singleton queues jobs of one name), or `scancel {holder}` first",
    )


def wait_for_slurm(ask: Callable[[], T | None]) -> T:
    """What slurmctld answers. Raises Refused when it does not for long."""
    answer = await_answer(ask)
    if answer is None:
        raise Refused("slurmctld does not answer, so it is not known what runs; submit again when it does")
    return answer


def write_key(attempt: Path) -> None:
    """Make the key of the attempt, in a file that only the user can read."""
    handle = retry_stale(lambda: os.open(AttemptDir(attempt).key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(16))
