"""The one rule of resuming: which recipe keys may differ from those of the run that a directory holds.

A resumed run stays the run that it was. What may change is where it runs, what it takes and how long it goes on, not
what it computes. `gspo plan`, `gspo train` and a SLURM job ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.shared_files import retry_stale
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.models import load_resolved
from gspo_megatron.plan.named_files import DEMONSTRATIONS, MODEL, OWN_CODE, TOKENIZER, digest_files, read_digests
from gspo_megatron.run_dir import CheckpointDir, RunDir, complete_checkpoints
from gspo_megatron.types import Finding

MAY_CHANGE = (
    "run.directory",
    "placement.",
    "trainer.",
    "cold_start.cache",
    "data.path",
    "data.held_out_path",
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
    "rollout.keep_samples",
    "rollout.model_runner",
    "rollout.vllm.",
    "weight_update.",
    "checkpoint.",
    "evaluation.",
    "metrics.",
    "acknowledge",
)
"""Keys that may change. The problems themselves, wherever they lie, are compared when the run starts, and so are other
files (`named_files.py`), which may lie elsewhere too."""
MUST_STAY = ("trainer.aux_loss_coefficient", "rollout.vllm.kv_cache_dtype")
"""Exceptions from MAY_CHANGE."""
WHAT = {
    MODEL: "config.json or weights", DEMONSTRATIONS: "demonstrations",
    TOKENIZER: "tokenizer, chat template or stop ids",
}  # fmt: skip
"""What `compare_files` compares, beside code of the user's own."""


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Compare a recipe with the one of the run that its directory holds, if it holds one here."""
    directory = recipe.run.directory
    if directory is None:
        return
    run = RunDir(directory)
    record, holds_checkpoints = find_record(run)
    if record is None:
        if holds_checkpoints:
            yield Finding(
                "resume-without-recipe", "error", "run.directory",
                f"{directory} holds checkpoints, and no {run.recipe.name} to compare this recipe with",
                "put the file back, or name another run.directory",
            )  # fmt: skip
        return
    try:
        before = load_resolved(record)
    except RecipeError as error:
        why = "; ".join(f"{found.key} {found.message}" for found in error.findings[:2])
        fix = "put the file back, remove it, or name another run.directory"
        yield Finding("resume-other-recipe", "error", "run.directory", f"{record} cannot be read: {why}", fix)
        return
    try:
        read_rows(directory)
    except RecipeError as error:
        yield from error.findings
    was, now = read_digests(run), dict(digest_files(recipe))
    yield from compare_recipes(before, recipe, {*was} & {*now})
    yield from compare_files(was, now)


def find_record(run: RunDir) -> tuple[Path | None, bool]:
    """The recipe that the state to go on from was made with, and whether the run holds checkpoints.

    The newest checkpoint's own copy counts: the one in the run directory is open to everybody's hand.
    """
    checkpoints = retry_stale(lambda: complete_checkpoints(run.checkpoints))
    records = [*(CheckpointDir(path).recipe for path in reversed(checkpoints)), run.recipe]
    return next((record for record in records if record.is_file()), None), bool(checkpoints)


def compare_recipes(before: Recipe, recipe: Recipe, compared: Set[str]) -> Iterator[Finding]:
    """Findings about keys that differ from those of the run that this would resume.

    Args:
        compared: keys whose files `compare_files` compares: where these lie may change.
    """
    directory = recipe.run.directory
    old, new = (flatten(one.model_dump(mode="json")) for one in (before, recipe))
    for key in sorted({*old, *new}):
        values = [one.get(key) for one in (old, new)]
        if key in compared:
            values = [str(value).rpartition(":")[2] if key in OWN_CODE else None for value in values]
        if values[0] != values[1] and not may_change(key):
            yield Finding(
                "resume-other-recipe", "error", key,
                f"{new.get(key)} here, {old.get(key)} in {directory}, which this would resume",
                "resume with the same recipe and overrides, or name another run.directory",
            )  # fmt: skip
    steps = before.trainer.max_steps, recipe.trainer.max_steps
    if recipe.optimizer.schedule != "constant" and steps[0] != steps[1]:
        message = f"{steps[1]} here, {steps[0]} in {directory}: the learning rate of the steps to come changes with it"
        fix = "nothing to do if that is meant"
        yield Finding("resume-other-schedule", "warning", "trainer.max_steps", message, fix)


def compare_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about files that were edited since the run was started or resumed the last time."""
    for key in sorted({*before} & {*now}):
        if before[key] == now[key]:
            continue
        if key in OWN_CODE:
            message = "the file that it names was edited since the run last started: the steps to come run other code"
            fix = "nothing to do if that is meant; acknowledge it to say why"
            yield Finding("resume-other-code", "warning", key, message, fix)
        else:
            message = f"the {WHAT[key]} there are not what the run began with"
            fix = "put the files back as they were, or start another run from its weights (model.path)"
            yield Finding("resume-other-files", "error", key, message, fix)


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a recipe key."""
    return key.startswith(MAY_CHANGE) and key not in MUST_STAY


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
