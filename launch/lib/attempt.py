"""Files of an attempt that the job script itself writes: who holds the run directory, and the job's key."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from gspo_megatron.cluster.slurm_commands import running_jobs
from gspo_megatron.run_dir import AttemptDir, RunDir
from launch.lib.plan_request import Plan, Refused


def claim_attempt(plan: Plan, job: str) -> None:
    """Make this the newest attempt of its run, after which older ones end.

    The attempt's directory was made exclusively, so of two jobs that start in the same second the one with the higher
    number sees the other here.

    Raises:
        Refused: a job with an older attempt of the run is running.
    """
    running = set(running_jobs()) - {job}
    holder = next((other for other in plan.earlier_jobs if other in running), None)
    if holder is not None:
        shutil.rmtree(plan.attempt, ignore_errors=True)
        raise Refused("run.directory: {}; {}".format(*in_use(plan.run_dir, holder)))
    replace_text(RunDir(plan.run_dir).attempt, f"{plan.number} {job}\n")
    latest = RunDir(plan.run_dir).latest
    fresh = latest.with_name(f".{latest.name}.{os.getpid()}")
    fresh.symlink_to(plan.attempt.name)
    fresh.replace(latest)


def in_use(run_dir: Path, holder: str) -> tuple[str, str]:
    """What is wrong with a run directory that another job is using, and what to do."""
    if os.environ.get("SLURM_ARRAY_JOB_ID"):
        return (
            f"job {holder} is running in {run_dir}: all tasks of --array have the same run.directory",
            "let one follow the other (--array=0-3%1), or leave run.directory out, which gives each task its own",
        )
    return f"job {holder} is running in {run_dir}", f"wait for it, or `scancel {holder}` first"


def write_key(attempt: Path) -> None:
    """Make the key of the attempt, in a file that only the user can read."""
    handle = os.open(AttemptDir(attempt).key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(16))


def remove_key(attempt: Path) -> None:
    """Take the key away; without it nothing can be asked of what may still run."""
    AttemptDir(attempt).key.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file that readers see whole, before or after."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)
