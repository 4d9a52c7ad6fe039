"""Whether a job may go on with what a run directory holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.attempts import read_attempt
from gspo_megatron.config import Recipe
from gspo_megatron.config.loading import refuse
from gspo_megatron.models import load_resolved
from gspo_megatron.run_dir import RunDir
from launch.lib.attempt import in_use

MAY_CHANGE = (
    "run.directory",
    "placement.",
    "trainer.",
    "cold_start.cache",
    "rollout.servers",
    "rollout.tensor_parallel",
    "rollout.pipeline_parallel",
    "rollout.expert_parallel",
    "rollout.decode_context_parallel",
    "rollout.prefix_caching",
    "rollout.expected_answer_tokens",
    "rollout.max_concurrency",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_fraction",
    "rollout.start_timeout",
    "weight_update.",
    "checkpoint.",
    "evaluation.",
    "metrics.",
    "acknowledge",
)
"""Recipe keys that a resumed run may have otherwise than before: where it runs, what it takes, not what it computes."""
MUST_STAY = ("trainer.aux_loss_coefficient",)
"""Exceptions from MAY_CHANGE."""


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
    holders = [*earlier, *([newest.job] if newest else [])]
    holder = next((holder for holder in holders if holder != job and holder in running), None)
    if holder is not None:
        raise refuse("run-in-use", "run.directory", *in_use(run_dir, holder))


def refuse_other_recipe(run_dir: Path, recipe: Recipe) -> None:
    """A resumed run stays the run that it was."""
    resolved = RunDir(run_dir).recipe
    if not resolved.is_file():
        return
    before = flatten(load_resolved(resolved).model_dump(mode="json"))
    now = flatten(recipe.model_dump(mode="json"))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not may_change(key):
            raise refuse(
                "resume-other-recipe", key,
                f"{now.get(key)} here, {before.get(key)} in {run_dir}, which this would resume",
                "resume with the same recipe and overrides, or name another run.directory",
            )  # fmt: skip


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a recipe key."""
    return key.startswith(MAY_CHANGE) and key not in MUST_STAY


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
