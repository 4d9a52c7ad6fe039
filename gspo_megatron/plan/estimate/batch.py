"""Sizes of a rollout batch: sequences, mini-batches, micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout, round_up
from gspo_megatron.plan.units import many
from gspo_megatron.types import Finding

PROMPT_SHARE = 0.25
"""Mean prompt length as a share of its limit. Prompts are short beside responses, so little depends on it."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How one rollout batch is divided. Numbers are totals over all ranks unless the name says otherwise."""

    prompts: int
    """Prompts per rollout batch."""
    answers: int
    """Responses per prompt."""
    sequences: int
    """Sequences per rollout batch."""
    updates: int
    """Optimizer steps per rollout batch."""
    sequences_per_update: int
    """Sequences of one mini-batch."""
    data_ranks: int
    """Data-parallel ranks that share a mini-batch."""
    sequences_per_rank: int
    """Sequences of one mini-batch on the fullest data-parallel rank."""
    longest_tokens: int
    """Tokens of the longest sequence: prompt and response at their limits, with padding for CP and TP."""
    expected_tokens: float
    """Tokens of a mean sequence."""
    micro_batch_tokens: int
    """Most tokens of one micro-batch of a data-parallel rank."""
    micro_batches_most: int
    """Micro-batches per update and rank if every sequence has the longest length."""
    micro_batches_expected: int
    """Micro-batches per update and rank at the mean length."""
    context_ranks: int
    """Ranks that share the tokens of one micro-batch."""
    pipeline_bubble: float
    """Share of the time that a pipeline stage is idle at the expected number of micro-batches."""

    @property
    def expected_tokens_per_batch(self) -> float:
        """Tokens per rollout batch at the mean length."""
        return self.sequences * self.expected_tokens

    def words(self) -> list[str]:
        """Describe the sizes in sentences."""
        each, held = self.micro_batch_tokens // self.context_ranks, self.micro_batch_tokens // self.longest_tokens
        groups = self.prompts // self.updates
        return [
            f"{many(self.prompts, 'prompt')} x {many(self.answers, 'response')} = {self.sequences} sequences per batch",
            f"{many(self.updates, 'optimizer step')} per rollout batch, each on {many(groups, 'whole group')} = "
            f"{many(self.sequences_per_update, 'sequence')}: the mini-batch, over all ranks",
            f"a mini-batch is divided over {many(self.data_ranks, 'data-parallel rank')}: at most "
            f"{many(self.sequences_per_rank, 'sequence')} each",
            f"a micro-batch holds {self.micro_batch_tokens:,} tokens of one data-parallel rank, {each:,} on each of "
            f"{many(self.context_ranks, 'context-parallel rank')}: {many(held, 'sequence')} of "
            f"{self.longest_tokens:,} tokens",
            f"an update has {many(self.micro_batches_expected, 'micro-batch')} per rank at the mean length of "
            f"{self.expected_tokens:,.0f} tokens, {self.micro_batches_most} if every response reaches the limit",
        ]


def plan_batch(recipe: Recipe, layout: Layout) -> BatchPlan:
    """Compute the sizes of one rollout batch."""
    batch, rollout, capacity = recipe.batch, recipe.rollout, recipe.trainer.micro_batch_tokens
    multiple = layout.pad_multiple
    longest = round_up(rollout.max_sequence_tokens, multiple)
    answer = min(rollout.expected_answer_tokens or rollout.max_answer_tokens / 2, rollout.max_answer_tokens)
    expected = min(float(longest), rollout.max_prompt_tokens * PROMPT_SHARE + answer + (multiple - 1) / 2)
    sequences = batch.prompts * batch.answers
    per_update = sequences // batch.updates
    per_rank = -(-per_update // layout.data)
    most = -(-per_rank // max(1, capacity // longest))
    likely = min(most, max(1, round(-(-per_rank * expected // capacity))))
    waiting = layout.pipeline - 1
    return BatchPlan(
        prompts=batch.prompts,
        answers=batch.answers,
        sequences=sequences,
        updates=batch.updates,
        sequences_per_update=per_update,
        data_ranks=layout.data,
        sequences_per_rank=per_rank,
        longest_tokens=longest,
        expected_tokens=expected,
        micro_batch_tokens=capacity,
        micro_batches_most=most,
        micro_batches_expected=likely,
        context_ranks=layout.context,
        pipeline_bubble=waiting / (layout.virtual * likely + waiting),
    )


def findings(recipe: Recipe, layout: Layout, plan: BatchPlan) -> Iterator[Finding]:
    """Find sequences that do not fit a micro-batch, and ranks and stages without work."""
    rollout = recipe.rollout
    if plan.longest_tokens > plan.micro_batch_tokens:
        yield Finding(
            "sequence-exceeds-micro-batch", "error", "trainer.micro_batch_tokens",
            f"{plan.micro_batch_tokens} tokens do not hold one sequence of {rollout.max_prompt_tokens} + "
            f"{rollout.max_answer_tokens} tokens, {plan.longest_tokens} padded to {layout.pad_multiple}",
            f"set it to at least {plan.longest_tokens}",
        )  # fmt: skip
        return
    if plan.sequences_per_update < layout.data:
        yield Finding(
            "data-ranks-without-work", "warning", "batch.prompts",
            f"a mini-batch of {plan.sequences_per_update} sequences leaves "
            f"{layout.data - plan.sequences_per_update} of "
            f"{layout.data} data-parallel ranks without one",
            "take more prompts or responses, fewer updates, or larger TP, PP or CP",
        )  # fmt: skip
    yield from _pipeline(recipe, layout, plan)


def _pipeline(recipe: Recipe, layout: Layout, plan: BatchPlan) -> Iterator[Finding]:
    stages, slots = layout.pipeline, plan.micro_batches_expected
    if layout.virtual > 1 and plan.micro_batches_most < stages:
        yield Finding(
            "micro-batches-below-pipeline", "error", "trainer.virtual_pipeline",
            f"an update has at most {plan.micro_batches_most} micro-batch(es) per rank; the interleaved schedule "
            f"requires at least PP = {stages}",
            "remove virtual_pipeline, lower micro_batch_tokens, or take more sequences per update",
        )  # fmt: skip
    elif layout.virtual > 1 and slots % stages:
        yield Finding(
            "micro-batches-beside-pipeline", "info", "trainer.virtual_pipeline",
            f"about {slots} micro-batches per rank; the interleaved schedule requires a multiple of PP = {stages}, so "
            f"empty ones are added up to {round_up(slots, stages)}",
            "choose micro_batch_tokens so that the number is near a multiple",
        )  # fmt: skip
    if plan.pipeline_bubble > 0.5:
        yield Finding(
            "pipeline-bubble", "warning", "trainer.pipeline_parallel",
            f"about {slots} micro-batch(es) for {stages} stages: each stage is idle {plan.pipeline_bubble:.0%} of the "
            "time",
            "take fewer stages, more sequences per update, or a lower micro_batch_tokens",
        )  # fmt: skip
