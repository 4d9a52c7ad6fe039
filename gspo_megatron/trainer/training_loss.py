"""The objective as the policy's training pass calls it: this rank's share of the loss of each micro-batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gspo_megatron.objective import LossInputs, ObjectiveSpec, policy_loss
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import LossFunction, Scored
from gspo_megatron.trainer.batches import MiniBatch, TrainingMicroBatch
from gspo_megatron.trainer.metric_sums import TOKEN_ENTROPY


def make_loss(
    spec: ObjectiveSpec,
    minibatch: MiniBatch[TrainingMicroBatch],
    logprobs: list[Tensor],
    clipped: list[Tensor],
    values: list[Tensor],
) -> LossFunction:
    """The loss of one mini-batch.

    Args:
        spec: the objective.
        minibatch: what is trained on.
        logprobs: gets the current log-probs [T_local] of each micro-batch, in order.
        clipped: gets `LossOutput.clipped` of each.
        values: gets the current values [T_local] of each, where there is a critic.
    """

    def loss(batch: MicroBatch, scored: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        micro = minibatch.micro_batches[index]
        now = scored.logprobs.detach()
        logprobs.append(now)
        read: dict[str, Tensor | None] = {
            "logprobs": scored.logprobs, "old_logprobs": minibatch.old_logprobs(index, now),
        }  # fmt: skip
        if spec.has_token_advantages:
            read["advantages"] = micro.advantages
        if spec.has_critic:
            assert scored.values is not None and micro.old is not None
            values.append(scored.values.detach())
            read |= {"values": scored.values, "old_values": micro.old.values, "returns": micro.returns}
        finite = torch.ones_like(batch.loss_mask)
        for numbers in read.values():
            finite = finite if numbers is None else finite & (torch.isfinite(numbers) | ~batch.loss_mask)
        kept = {name: None if found is None else torch.where(finite, found, 0.0) for name, found in read.items()}
        inputs = LossInputs(
            **{"advantages": micro.advantages, **cast("dict[str, Any]", kept)},
            rollout_logprobs=batch.rollout_logprobs,
            reference_logprobs=None if micro.reference is None else micro.reference.logprobs,
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            totals=minibatch.totals,
            staleness=minibatch.staleness(index, spec),
            token_advantages=spec.has_token_advantages,
        )
        out = policy_loss(spec, inputs, batch.share.sum)
        clipped.append(out.clipped)
        entropy = torch.where(batch.loss_mask & finite, scored.entropy, 0.0).sum(dtype=torch.float64)
        bad = out.metrics["nonfinite_tokens"] + (~finite).sum(dtype=torch.float64)
        # A gradient that is not finite is what skips the step on every rank.
        share = out.loss * torch.where(finite.all(), 1.0, float("nan"))
        return share, {**out.metrics, "nonfinite_tokens": bad, TOKEN_ENTROPY: entropy}

    return loss
