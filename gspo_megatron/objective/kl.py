"""Estimators of the divergence from a reference policy, from log-probs of sampled tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.bounded import bounded_expm1
from gspo_megatron.objective.packed import Packed, SumOverContext, identity

Estimator = Literal["k1", "k2", "k3", "k3_unbiased"]


def kl_estimate(kind: Estimator, current: Tensor, reference: Tensor, ratio: Tensor) -> Tensor:
    """[T] estimate of KL(current || reference) at each token.

    Args:
        kind: k1 = x, k2 = x^2/2, k3 = exp(-x) - 1 + x with x = current - reference; k3_unbiased = ratio * k3.
        current: [T] log-probs, with gradient when it is a loss.
        reference: [T].
        ratio: [T] token ratio current / old, which re-weights tokens that old weights sampled.
    """
    gap = current - reference
    if kind == "k1":
        return gap
    if kind == "k2":
        return gap.square() / 2
    k3 = bounded_expm1(-gap) + gap
    return ratio * k3 if kind == "k3_unbiased" else k3


def kl_in_reward(
    spec: ObjectiveSpec,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    sum_over_context: SumOverContext = identity,
) -> Tensor:
    """[S] float64 to subtract from the rewards before advantages are taken: coefficient x the sum over the answer.

    Args:
        spec: kl and kl_coefficient; kl_in must be reward.
        old_logprobs: [T] under the weights that the advantages are for.
        reference_logprobs: [T].
        loss_mask: [T] bool.
        cu_seqlens: [S+1].
        sum_over_context: as in `policy_loss`.
    """
    if spec.kl in ("none", "k3_unbiased") or spec.kl_in != "reward":
        raise ValueError(
            f"kl={spec.kl} in the {spec.kl_in} charges nothing in the reward; set kl to k1, k2 or k3, and kl_in=reward"
        )
    packed = Packed.of(loss_mask, cu_seqlens, sum_over_context)
    old, reference = packed.trained(old_logprobs), packed.trained(reference_logprobs)
    return spec.kl_coefficient * packed.totals(kl_estimate(spec.kl, old, reference, torch.ones_like(old)))
