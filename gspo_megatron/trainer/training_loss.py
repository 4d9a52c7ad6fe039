"""The objective as the policy's training pass calls it: this rank's share of the loss of each micro-batch."""

from __future__ import annotations

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
) -> LossFunction:
    """The loss of one mini-batch.

    Args:
        spec: the objective.
        minibatch: what is trained on.
        logprobs: gets the current log-probs [T_local] of each micro-batch, in order.
        clipped: gets `LossOutput.clipped` of each.
    """

    def loss(batch: MicroBatch, scored: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        micro = minibatch.micro_batches[index]
        now = scored.logprobs.detach()
        logprobs.append(now)
        old = minibatch.old_logprobs(index, now)
        finite = torch.isfinite(scored.logprobs) | ~batch.loss_mask
        if old is not None:
            finite = finite & (torch.isfinite(old) | ~batch.loss_mask)
            old = torch.where(finite, old, 0.0)
        inputs = LossInputs(
            logprobs=torch.where(finite, scored.logprobs, 0.0),
            old_logprobs=old,
            rollout_logprobs=batch.rollout_logprobs,
            reference_logprobs=None if micro.reference is None else micro.reference.logprobs,
            advantages=micro.advantages,
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            totals=minibatch.totals,
            staleness=minibatch.staleness(index, spec),
            token_advantages=False,
        )
        out = policy_loss(spec, inputs, batch.share.sum)
        clipped.append(out.clipped)
        entropy = torch.where(batch.loss_mask & finite, scored.entropy, 0.0).sum(dtype=torch.float64)
        bad = out.metrics["nonfinite_tokens"] + (~finite).sum(dtype=torch.float64)
        # A gradient that is not finite is what skips the step on every rank.
        share = out.loss * torch.where(finite.all(), 1.0, float("nan"))
        return share, {**out.metrics, "nonfinite_tokens": bad, TOKEN_ENTROPY: entropy}

    return loss
