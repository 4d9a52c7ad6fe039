"""Advantages of a rollout batch, from what every rank knows: rewards, lengths and groups."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.objective import BatchTotals, ObjectiveSpec, group_advantages, group_metrics, shape_rewards
from gspo_megatron.types import SampleRef

SAMPLED = 32
"""One response in so many with advantage 0 is in the passes. At 40 % of such responses that costs 1/80 of a pass."""


def rewards_of(refs: Sequence[SampleRef]) -> Tensor:
    """[N] float64 rewards."""
    return torch.tensor([ref.reward for ref in refs], dtype=torch.float64)


def groups_of(refs: Sequence[SampleRef]) -> Tensor:
    """[N] the group of each response."""
    return torch.tensor([ref.prompt_index for ref in refs])


def reward_metrics(recipe: Recipe, refs: Sequence[SampleRef]) -> dict[str, float]:
    """Logged metrics of the rewards and their groups."""
    return group_metrics(rewards_of(refs), groups_of(refs), recipe.reward.bounds)


def shaped_rewards(recipe: Recipe, spec: ObjectiveSpec, refs: Sequence[SampleRef]) -> Tensor:
    """[N] float64 rewards after the length rule."""
    lengths = torch.tensor([ref.answer_length for ref in refs])
    truncated = torch.tensor([ref.stop_reason == "length" for ref in refs])
    longest = recipe.rollout.max_answer_tokens
    limits = torch.tensor([longest if ref.limit is None else ref.limit for ref in refs])
    return shape_rewards(spec, rewards_of(refs), lengths, truncated, limits, recipe.reward.bounds[0])


def advantages_of(spec: ObjectiveSpec, refs: Sequence[SampleRef], shaped: Tensor) -> dict[SampleRef, float]:
    """The advantage of every response; whole groups count, whatever was left out of training.

    Args:
        spec: the objective.
        refs: [N] the responses.
        shaped: [N] their rewards, after every rule.
    """
    values = group_advantages(shaped, groups_of(refs), spec.advantage, spec.advantage_ddof, spec.advantage_eps)
    return dict(zip(refs, values.float().tolist(), strict=True))


def responses_left_out(
    recipe: Recipe, spec: ObjectiveSpec, refs: Sequence[SampleRef], parts: Sequence[Sequence[SampleRef]]
) -> frozenset[SampleRef]:
    """Responses with advantage 0, where they may be left out of the passes, but for a sampled share.

    The share keeps the metrics of log-probs alive: the same 1 in `SAMPLED` on every rank, and at least one response of
    every mini-batch, its shortest.

    Args:
        recipe: of the run.
        spec: the objective.
        refs: the whole rollout batch.
        parts: what each mini-batch trains on.
    """
    if not recipe.skips_zero_gradients:
        return frozenset()
    advantages = advantages_of(spec, refs, shaped_rewards(recipe, spec, refs))
    silent = {ref for ref, advantage in advantages.items() if advantage == 0 and not _is_sampled(ref)}
    for part in parts:
        if silent.issuperset(part):
            silent.remove(min(part, key=lambda ref: ref.prompt_length + ref.answer_length))
    return frozenset(silent)


def _is_sampled(ref: SampleRef) -> bool:
    return zlib.crc32(f"{ref.prompt_index}/{ref.sample_index}".encode()) % SAMPLED == 0


def count(refs: Sequence[SampleRef]) -> BatchTotals:
    """How many sequences and trained tokens these are."""
    return BatchTotals(len(refs), sum(ref.trained_length for ref in refs))
