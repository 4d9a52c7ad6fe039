"""What the training passes of a step said of each response, for the page of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gspo_megatron.data.log_ratios import TrainedResponse
from gspo_megatron.trainer.failure_dump import TrainedUpdate


def trained_responses(update: TrainedUpdate, sum_over_context: Callable[[Tensor], Tensor]) -> Iterator[TrainedResponse]:
    """The responses of one update, the same on every rank that shares them; none off the last stage.

    Args:
        update: of this rank.
        sum_over_context: as in `policy_loss`.
    """
    passes = zip(update.minibatch.micro_batches, update.logprobs, update.clipped, strict=False)
    for micro, now, clipped in passes:
        batch = micro.batch
        starts = batch.params.cu_seqlens_q.tolist()
        whole = torch.zeros(starts[-1], dtype=torch.float32, device=now.device)
        whole[batch.indices] = torch.where(batch.loss_mask, now.float() - batch.rollout_logprobs, 0.0)
        ratios = sum_over_context(whole).half().cpu().numpy()
        left, right = sum_over_context(clipped.clone()).tolist()
        # A micro-batch that only fills a slot has no reference.
        for ref, start, low, high in zip(micro.refs, starts, left, right, strict=False):
            first = start + ref.prompt_length - 1  # the last token of the prompt predicts the first of the response
            tokens = ratios[first : first + ref.answer_length]
            yield TrainedResponse(ref.prompt_index, ref.sample_index, low, high, tokens)
