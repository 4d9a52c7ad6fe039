"""Rules for long responses: settings that have no effect, or another effect than their name promises."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Check length stages, the thinking budget and the repetition halt."""
    yield from _stages(recipe)
    yield from _thinking(recipe)
    yield from _halt(recipe)


def _stages(recipe: Recipe) -> Iterator[Finding]:
    stages, steps = recipe.rollout.length_stages, recipe.trainer.max_steps
    if not stages:
        return
    if stages[-1].until_step >= steps:
        yield Finding(
            "length-stage-inert", "warning", "rollout.length_stages",
            f"the last stage lasts until step {stages[-1].until_step} of {steps}: no response ever reaches "
            f"max_answer_tokens={recipe.rollout.max_answer_tokens}, for which servers and micro-batches are sized",
            "end the stages earlier, or lower rollout.max_answer_tokens",
        )  # fmt: skip
    objective = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    shortest, buffer = stages[0].max_answer_tokens, objective.overlong_buffer
    if objective.overlong == "soft" and buffer is not None and buffer > shortest:
        yield Finding(
            "overlong-buffer-too-long", "error", "rollout.length_stages",
            f"objective.overlong_buffer={buffer} is longer than the responses of the first stage, {shortest} tokens",
            "shorten the buffer, or start with longer responses",
        )  # fmt: skip


def _thinking(recipe: Recipe) -> Iterator[Finding]:
    thinking, rollout = recipe.rollout.thinking, recipe.rollout
    if thinking is None:
        return
    shortest = min([rollout.max_answer_tokens, *(stage.max_answer_tokens for stage in rollout.length_stages)])
    if thinking.budget >= shortest:
        yield Finding(
            "thinking-budget-inert", "warning", "rollout.thinking",
            f"a budget of {thinking.budget} tokens in responses of up to {shortest}: they are cut before it is used up",
            "set the budget well below the limit, so that the answer fits after it",
        )  # fmt: skip


def _halt(recipe: Recipe) -> Iterator[Finding]:
    halt, limit = recipe.rollout.repetition_halt, recipe.rollout.max_answer_tokens
    if halt is None:
        return
    if halt.longest_pattern * halt.times > limit:
        yield Finding(
            "repetition-halt-inert", "warning", "rollout.repetition_halt",
            f"{halt.times} times a pattern of {halt.longest_pattern} tokens are {halt.longest_pattern * halt.times}, "
            f"but a response has at most {limit}: the longer patterns are never found",
            f"set longest_pattern to {max(1, limit // halt.times)} or fewer tokens, or times lower",
        )  # fmt: skip
    if not recipe.reward.require_stop:
        yield Finding(
            "halted-answer-scored", "warning", "reward.require_stop",
            "false: a response that was halted because it repeats itself is scored by its text so far",
            "set reward.require_stop=true, or remove rollout.repetition_halt",
        )  # fmt: skip
