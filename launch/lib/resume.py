"""Whether a job may go on with a run directory: no other job does. The rule for recipes: plan/rules/resume.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.cluster.attempts import is_copied, read_attempt
from gspo_megatron.config.loading import refuse
from launch.lib.attempt import in_use


def refuse_other_job(run_dir: Path, job: str, running: Sequence[str], earlier: Sequence[str] = ()) -> None:
    """Two jobs must not write one run.

    Args:
        run_dir: the run.
        job: this one.
        running: the user's jobs that run.
        earlier: jobs of older attempts.
    """
    try:
        newest = read_attempt(run_dir)
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)
        newest = None
    holders = [*earlier, *([newest.job] if newest and not is_copied(run_dir, newest.place) else [])]
    holder = next((holder for holder in holders if holder != job and holder in running), None)
    if holder is not None:
        raise refuse("run-in-use", "run.directory", *in_use(run_dir, holder))
