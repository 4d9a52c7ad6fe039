"""The one rule of resuming: which recipe keys may differ from those of the run that a directory holds.

A resumed run stays the run that it was. What may change is where it runs, what it takes and how long it goes on, not
what it computes. `gspo plan`, `gspo train` and a SLURM job ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path, PurePath
from typing import Any

from gspo_megatron.cluster.attempts import find_checkpoint
from gspo_megatron.cluster.shared_files import retry_stale
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.models import load_resolved
from gspo_megatron.plan.named_files import (
    DEMONSTRATIONS,
    MODEL,
    OWN_CODE,
    TOKENIZER,
    WEIGHTS,
    Digests,
    digest_files,
    read_digests,
)
from gspo_megatron.plan.units import value_text
from gspo_megatron.run_dir import CheckpointDir, RunDir, complete_checkpoints
from gspo_megatron.types import Finding

MAY_CHANGE = (
    "run.directory",
    "run.name",
    "placement.",
    "trainer.",
    "cold_start.cache",
    "data.path",
    "data.held_out_path",
    "data.prompt_key",
    "data.answer_key",
    "data.tools_key",
    "reward.judge.url",
    "reward.judge.key_variable",
    "reward.judge.at_once",
    "reward.judge.request_seconds",
    "reward.judge.attempts",
    "reward.judge.prompt_price",
    "reward.judge.answer_price",
    "teacher.url",
    "teacher.key_variable",
    "teacher.at_once",
    "teacher.request_seconds",
    "teacher.attempts",
    "environment.seconds",
    "agent.seconds",
    "agent.concurrency",
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
PLACES = frozenset({TOKENIZER, MODEL, DEMONSTRATIONS, *OWN_CODE})
"""Keys that name files which `named_files.py` has digests of."""
MOST = 6
"""Keys that are named one by one; a run that differs in more is another run."""


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
    yield from compare_checkpoints(run)
    was, now = read_digests(run), digest_files(recipe)
    starts_again = begins_anew(recipe)
    unread = set() if starts_again else {DEMONSTRATIONS}
    yield from compare_recipes(before, recipe, {*was} & {*now} | unread, record, unknown=set() if was else PLACES)
    yield from compare_files(was, {key: now[key] for key in {*now} - unread}, starts_again)


def begins_anew(recipe: Recipe) -> bool:
    """Whether a run reads again what it starts from: it has no checkpoint here, or a reference policy."""
    directory = recipe.run.directory
    if directory is None or recipe.objective.kl != "none":
        return True
    return find_checkpoint(RunDir(directory).checkpoints)[0] is None


def compare_checkpoints(run: RunDir) -> Iterator[Finding]:
    """Findings about checkpoints that cannot be resumed from."""
    usable, faults = find_checkpoint(run.checkpoints)
    for path, fault in faults.items():
        what = f"{path.name} cannot be resumed from: {fault}"
        if usable is None:
            yield Finding(
                "checkpoint-damaged", "error", "run.directory", what, "put its files back, or move it elsewhere"
            )
        else:
            fix = f"nothing to do if the run may go on after {usable.name}"
            yield Finding("checkpoint-damaged", "warning", "run.directory", what, fix)


def find_record(run: RunDir) -> tuple[Path | None, bool]:
    """The recipe that the state to go on from was made with, and whether the run holds checkpoints.

    The newest checkpoint's own copy counts: the one in the run directory is open to everybody's hand.
    """
    checkpoints = retry_stale(lambda: complete_checkpoints(run.checkpoints))
    records = [*(CheckpointDir(path).recipe for path in reversed(checkpoints)), run.recipe]
    return next((record for record in records if retry_stale(record.is_file)), None), bool(checkpoints)


def compare_recipes(
    before: Recipe, recipe: Recipe, compared: Set[str], record: Path, unknown: Set[str] = frozenset()
) -> Iterator[Finding]:
    """Findings about keys that differ from those of the run that this would resume.

    Args:
        compared: keys whose files `compare_files` compares, or that nothing reads: where these lie may change.
        record: the file that holds `before`.
        unknown: keys whose files nobody can compare: they may lie elsewhere under the same name, with a warning.
    """
    directory = recipe.run.directory
    old, new = (flatten(one.model_dump(mode="json")) for one in (before, recipe))
    other = []
    for key in sorted({*old, *new}):
        values = [one.get(key) for one in (old, new)]
        if key in compared:
            values = [str(value).rpartition(":")[2] if key in OWN_CODE else None for value in values]
        if values[0] == values[1] or may_change(key):
            continue
        names = [PurePath(value).name if isinstance(value, str) else None for value in values]
        if key in unknown - compared and None not in names and names[0] == names[1]:
            message = f"{values[1]} here, {values[0]} in {directory}, which keeps no digests: the same cannot be seen"
            fix = "nothing to do if the files were only moved"
            yield Finding("resume-not-compared", "warning", key, message, fix)
            continue
        other.append(key)
    fix = "resume with the same recipe and overrides, or name another run.directory"
    if len(other) > MOST:
        message = f"{record} is of another run: {len(other)} keys differ, {', '.join(other[:MOST])} among them"
        yield Finding("resume-other-recipe", "error", "run.directory", message, fix)
        return
    for key in other:
        message = f"{value_text(new.get(key))} here, {value_text(old.get(key))} in {directory}, which this would resume"
        yield Finding("resume-other-recipe", "error", key, message, fix)
    steps = before.trainer.max_steps, recipe.trainer.max_steps
    if recipe.optimizer.schedule != "constant" and steps[0] != steps[1]:
        message = f"{steps[1]} here, {steps[0]} in {directory}: the learning rate of the steps to come changes with it"
        fix = "nothing to do if that is meant"
        yield Finding("resume-other-schedule", "warning", "trainer.max_steps", message, fix)


def compare_files(was: Digests, now: Digests, reads_weights: bool) -> Iterator[Finding]:
    """Findings about files that were edited since the run was started or resumed the last time.

    Args:
        was: digests of that time.
        now: digests of today.
        reads_weights: whether the weights of the model are read again.
    """
    for key in sorted({*was} & {*now}):
        parts = sorted(name for name in {*was[key], *now[key]} if was[key].get(name) != now[key].get(name))
        parts = [name for name in parts if name != WEIGHTS or (reads_weights and WEIGHTS in now[key])]
        if not parts:
            continue
        if key in OWN_CODE:
            message = "the file that it names was edited since the run last started: the steps to come run other code"
            fix = "nothing to do if that is meant; acknowledge it to say why"
            yield Finding("resume-other-code", "warning", key, message, fix)
        else:
            message = f"not what the run began with: {', '.join(parts)}"
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
