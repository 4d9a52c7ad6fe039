"""The length rule of the objective: rewards of long responses, and which of them are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec


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
    spec: ObjectiveSpec, rewards: Tensor, lengths: Tensor, truncated: Tensor, limits: Tensor, lowest: float = 0.0
) -> Tensor:
    """[N] rewards after the spec's length rule: what advantages are computed from.

    Args:
        spec: overlong and overlong_buffer.
        rewards: [N] scores.
        lengths: [N] response tokens.
        truncated: [N] bool: cut at the limit.
        limits: [N] most tokens that each response might get.
        lowest: score of a wrong response, the low end of `reward.bounds`.
    """
    if spec.overlong == "soft":
        if spec.overlong_buffer is None:
            raise ValueError("overlong=soft has no overlong_buffer; set it, e.g. to a fifth of the answer limit")
        return rewards + soft_overlong_penalty(lengths, limits, spec.overlong_buffer).to(rewards.dtype)
    return torch.where(truncated, lowest, rewards) if spec.overlong == "zero" else rewards


def is_trained(spec: ObjectiveSpec, truncated: bool) -> bool:
    """Whether a response is trained on. One that overlong=filter leaves out still counts in its group's mean."""
    return not (spec.overlong == "filter" and truncated)
