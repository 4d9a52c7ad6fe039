"""What the training passes of a step said of each response, for the page of the run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gspo_megatron.data.log_ratios import TrainedResponse
from gspo_megatron.trainer.failure_dump import TrainedUpdate


def trained_responses(update: TrainedUpdate) -> Iterator[TrainedResponse]:
    """The responses of one update, on the first of the ranks that share them; none off the last stage."""
    passes = zip(update.minibatch.micro_batches, update.logprobs, update.clipped, strict=False)
    for micro, now, clipped in passes:
        batch = micro.batch
        starts = batch.params.cu_seqlens_q.tolist()
        whole = torch.zeros(starts[-1], dtype=torch.float32, device=now.device)
        whole[batch.indices] = torch.where(batch.loss_mask, now.float() - batch.rollout_logprobs, 0.0)
        ratios = batch.share.sum(whole).half().cpu().numpy()
        left, right = batch.share.sum(clipped.clone()).tolist()
        if batch.share.rank:
            continue
        # A micro-batch that only fills a slot has no reference.
        for ref, start, low, high in zip(micro.refs, starts, left, right, strict=False):
            first = start + ref.prompt_length - 1  # the last token of the prompt predicts the first of the response
            tokens = ratios[first : first + ref.answer_length]
            yield TrainedResponse(ref.prompt_index, ref.sample_index, low, high, tokens)
