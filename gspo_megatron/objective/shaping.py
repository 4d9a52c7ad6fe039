"""Length handling and the group filter, as pure functions of rewards and lengths.

All take and return [N] tensors, one entry an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.advantages import equal_groups, number_groups


@dataclass(frozen=True, slots=True)
class ShapedRewards:
    """Rewards after the length rule."""

    rewards: Tensor
    """[N] what advantages are taken of."""
    trained: Tensor
    """[N] bool: answers that are trained on; the others still count in their group's mean."""


def soft_overlong_penalty(lengths: Tensor, limits: Tensor, buffer: int) -> Tensor:
    """[N] float64 in [-1, 0]: 0 up to limit - buffer, then linearly down to -1 at the limit (DAPO).

    Args:
        lengths: [N] answer tokens.
        limits: [N] most tokens that each answer might get.
        buffer: tokens over which the penalty grows.

    Raises:
        ValueError: the buffer is longer than an answer might get.
    """
    if len(limits) and not 0 < buffer <= (shortest := int(limits.min())):
        raise ValueError(f"overlong_buffer={buffer} must lie in 1..{shortest}, the answer limit; change it")
    return ((limits - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def shape_rewards(
    spec: ObjectiveSpec, rewards: Tensor, lengths: Tensor, truncated: Tensor, limits: Tensor
) -> ShapedRewards:
    """Apply the spec's length rule.

    Args:
        spec: overlong and overlong_buffer.
        rewards: [N] scores.
        lengths: [N] answer tokens.
        truncated: [N] bool: cut at the limit.
        limits: [N] most tokens that each answer might get.
    """
    everything = torch.ones_like(truncated, dtype=torch.bool)
    if spec.overlong == "soft":
        if spec.overlong_buffer is None:
            raise ValueError("overlong=soft has no overlong_buffer; set it, e.g. to a fifth of the answer limit")
        penalty = soft_overlong_penalty(lengths, limits, spec.overlong_buffer)
        return ShapedRewards(rewards + penalty.to(rewards.dtype), everything)
    if spec.overlong == "zero":
        return ShapedRewards(torch.where(truncated, 0.0, rewards), everything)
    if spec.overlong == "filter":
        return ShapedRewards(rewards, ~truncated)
    return ShapedRewards(rewards, everything)


def informative_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: answers of groups whose rewards differ (dynamic sampling keeps these and refills the rest).

    Args:
        rewards: [N] scores before any length rule: a group that is all right or all wrong teaches nothing.
        group_ids: [N].
    """
    group, num_groups = number_groups(group_ids)
    return ~equal_groups(rewards.double(), group, num_groups)[group]
