"""Numbers of response tokens at their places in a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.types import SampleRef


def place_values(refs: Sequence[SampleRef], batch: MicroBatch, values_of: Callable[[SampleRef], Tensor]) -> Tensor:
    """[T_local] float32: the number of each target; 0 beside responses.

    Args:
        refs: [S] the sequences of the micro-batch in order; none where it only fills a slot.
        batch: the micro-batch, or this context-parallel rank's part of it.
        values_of: [answer_length] numbers of a response.
    """
    starts = batch.params.cu_seqlens_q.tolist()
    whole = torch.zeros(starts[-1])
    for ref, start in zip(refs, starts, strict=False):
        first = start + ref.prompt_length - 1  # the last token of the prompt predicts the first of the response
        whole[first : first + ref.answer_length] = values_of(ref)
    return whole.to(batch.indices.device)[batch.indices]
