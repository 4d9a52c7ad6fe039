"""Pairs of keys that do not fit each other: each value is in order alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.rules.ranges import WIDE
from gspo_megatron.types import Finding

FEWEST_SEQUENCES = 16
"""Sequences of a mini-batch below which its gradient is mostly noise. Public recipes have 64 to 512."""
FEWEST_PROMPTS = 4
"""Prompts of a mini-batch below which it follows single problems. DAPO has 32, GSPO a quarter of a batch."""
LOCAL_ROOTS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local")
"""Directories that each node has for itself."""
EXPECTED_SHARE = 0.02
"""Least expected response length as a share of the limit."""


def findings(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Check what requires neither a layout nor an estimate."""
    yield from _template(recipe)
    yield from _batch(recipe, arch)
    yield from _lengths(recipe)
    yield from _steps(recipe)
    yield from _optimizer(recipe)
    yield from _critic(recipe)
    yield from _unread(recipe, machine)
    yield from _directories(recipe, machine)


def _template(recipe: Recipe) -> Iterator[Finding]:
    for name in ("system_prompt", "enable_thinking"):
        if recipe.tokenizer.kind == "sentencepiece" and getattr(recipe.tokenizer, name) is not None:
            yield Finding(
                "no-chat-template", "error", f"tokenizer.{name}",
                f"{name} is for a chat template, and kind=sentencepiece has none", f"remove {name}",
            )  # fmt: skip


def _batch(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    batch = recipe.batch
    prompts, sequences = batch.prompts // batch.updates, batch.prompts * batch.answers // batch.updates
    if arch.hidden_size < WIDE:
        return
    advantage = recipe.objective.spec(recipe.rollout.max_answer_tokens).advantage
    if batch.answers == 2 and advantage == "std":
        yield Finding(
            "group-of-two", "warning", "batch.answers",
            "with 2 responses per prompt advantage=std is +1 and -1 for any two rewards, and a mean of 2 is mostly "
            "noise; public recipes have 8 to 64",
            "set it to 8 or more, or objective.advantage=rloo, which was published with 2 and 4",
        )  # fmt: skip
    if batch.updates > 1 and prompts == 1:
        yield Finding(
            "update-of-one-prompt", "warning", "batch.updates",
            f"{batch.updates} updates of {batch.prompts} prompts: each trains on one prompt, so its direction is that "
            "prompt's",
            f"set it to {max(1, batch.prompts // 16)} or fewer, or take more prompts",
        )  # fmt: skip
    elif batch.updates > 1 and prompts < FEWEST_PROMPTS:
        yield Finding(
            "update-of-few-prompts", "warning", "batch.updates",
            f"{batch.updates} updates of {batch.prompts} prompts: each trains on {prompts} prompts, and public recipes "
            "have 16 to 256",
            f"set it to {max(1, batch.prompts // 16)} or fewer, or take more prompts",
        )  # fmt: skip
    elif sequences < FEWEST_SEQUENCES:
        yield Finding(
            "small-update", "warning", "batch.prompts",
            f"an update trains on {sequences} sequences ({batch.prompts} prompts x {batch.answers} responses / "
            f"{batch.updates} updates); public recipes have 64 to 512",
            "take more prompts or responses, or fewer updates",
        )  # fmt: skip


def _lengths(recipe: Recipe) -> Iterator[Finding]:
    rollout = recipe.rollout
    expected, limit = rollout.expected_answer_tokens, rollout.max_answer_tokens
    if expected is not None and expected < EXPECTED_SHARE * limit:
        yield Finding(
            "expected-far-below-limit", "warning", "rollout.expected_answer_tokens",
            f"{expected} is {expected / limit:.1%} of max_answer_tokens={limit}: times and memory are planned for "
            "responses that hardly use the limit",
            "set it to the mean length of the model's responses, or lower max_answer_tokens",
        )  # fmt: skip
    # A message an answer is no stream: a lost server costs the whole response.
    if rollout.stream_interval > limit and limit > 1024:
        yield Finding(
            "stream-in-one-message", "warning", "rollout.stream_interval",
            f"{rollout.stream_interval} is more than max_answer_tokens={limit}: a lost server costs whole responses",
            "set it to 64 to 512",
        )  # fmt: skip


def _steps(recipe: Recipe) -> Iterator[Finding]:
    steps, total, warmup = recipe.trainer.max_steps, recipe.total_updates, recipe.optimizer.warmup_updates
    if 0 < total < 2 * warmup <= 2 * total:
        yield Finding(
            "warmup-half-the-run", "warning", "optimizer.warmup_updates",
            f"{warmup} of {total} updates are warm-up",
            "shorten it to a tenth of the run, or raise trainer.max_steps",
        )  # fmt: skip
    evaluation = recipe.evaluation
    if 0 < steps < evaluation.every and recipe.planned_evaluation:
        yield Finding(
            "no-evaluation-in-between", "info", "evaluation.every",
            f"{evaluation.every} is above trainer.max_steps={steps}: only the start and the end are evaluated",
            "lower it, or leave it",
        )  # fmt: skip
    start = recipe.cold_start
    if start is not None and start.warmup_steps > start.steps:
        yield Finding(
            "warmup-beyond-run", "warning", "cold_start.warmup_steps",
            f"{start.warmup_steps} steps of warm-up in a cold start of {start.steps}",
            "shorten it, or raise cold_start.steps",
        )  # fmt: skip
    if start is not None and not 0 <= start.accuracy_band[0] < start.accuracy_band[1] <= 1:
        yield Finding(
            "empty-band", "error", "cold_start.accuracy_band",
            f"{list(start.accuracy_band)} is no interval within 0 to 1",
            "give the low end first, e.g. [0.15, 0.5]",
        )  # fmt: skip


def _optimizer(recipe: Recipe) -> Iterator[Finding]:
    rows: tuple[tuple[str, Sequence[float]], ...] = (("optimizer", recipe.optimizer.betas),)
    if recipe.cold_start is not None:
        rows += (("cold_start", recipe.cold_start.betas),)
    for section, (first, second) in rows:
        if second < first:
            yield Finding(
                "betas-swapped", "warning", f"{section}.betas",
                f"[{first:g}, {second:g}]: the mean of squares forgets faster than the mean it scales; public recipes "
                "have the larger one second",
                f"set it to [{second:g}, {first:g}]",
            )  # fmt: skip
    optimizer = recipe.optimizer
    if optimizer.schedule != "constant" and optimizer.final_fraction == 1:
        yield Finding(
            "schedule-inert", "warning", "optimizer.final_fraction",
            f"1 with schedule={optimizer.schedule}: the learning rate ends where it starts",
            "set it to 0 to 0.5, or optimizer.schedule=constant",
        )  # fmt: skip
    exports, steps = recipe.checkpoint.export_every, recipe.trainer.max_steps
    if exports and exports > steps > 0:
        yield Finding(
            "no-export-in-between", "warning", "checkpoint.export_every",
            f"{exports} is above trainer.max_steps={steps}: no model is exported before the end",
            f"set it to {steps} or less, or to 0",
        )  # fmt: skip


def _critic(recipe: Recipe) -> Iterator[Finding]:
    critic, steps = recipe.critic, recipe.trainer.max_steps
    for key in () if recipe.objective.has_critic else type(critic).model_fields:
        if getattr(critic, key) != type(critic).model_fields[key].default:
            yield Finding(
                "critic-inert", "error", f"critic.{key}",
                f"{getattr(critic, key)} has no effect: objective.advantage={recipe.objective.advantage} has no critic",
                "remove it, or set objective.preset=ppo",
            )  # fmt: skip
    if recipe.objective.has_critic and 0 < steps <= critic.warmup_steps:
        yield Finding(
            "critic-warmup-only", "error", "critic.warmup_steps",
            f"{critic.warmup_steps} of trainer.max_steps={steps}: the policy never learns",
            "shorten it to a tenth of the run, or raise trainer.max_steps",
        )  # fmt: skip


def _unread(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    data, memory = recipe.data, recipe.rollout.kv_cache_gib
    if data.prompt_key == data.answer_key:
        yield Finding(
            "answer-in-the-question", "error", "data.prompt_key",
            f"{data.prompt_key}, the same field as data.answer_key: the model is asked the answer",
            "name the field of the question",
        )  # fmt: skip
    if not machine.is_cpu and memory != type(recipe.rollout).model_fields["kv_cache_gib"].default:
        yield Finding(
            "kv-cache-inert", "warning", "rollout.kv_cache_gib",
            f"{memory:g} has no effect on a GPU, where rollout.gpu_memory_fraction decides",
            "remove it, and set rollout.gpu_memory_fraction",
        )  # fmt: skip


def _directories(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if machine.nodes == 1:
        return
    rows: tuple[tuple[str, Path | None], ...] = (
        ("run.directory", recipe.run.directory),
        ("cold_start.cache", recipe.cold_start.cache if recipe.cold_start else None),
    )
    for key, path in rows:
        root = next((root for root in LOCAL_ROOTS if path is not None and path.is_relative_to(root)), None)
        if root is not None:
            yield Finding(
                "directory-of-one-node", "warning", key,
                f"{path} lies under {root}, which each of the {machine.nodes} nodes has for itself; every node must "
                "see the same files",
                "name a directory of the shared file system",
            )  # fmt: skip
