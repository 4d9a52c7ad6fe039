"""How old the weights are that sampled each token of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.trainer.response_tokens import place_values
from gspo_megatron.types import SampleRef


def token_staleness(refs: Sequence[SampleRef], batch: MicroBatch, version: int) -> Tensor:
    """[T_local] float32: weight versions between the one that sampled each target and `version`; 0 beside responses.

    Args:
        refs: [S] the sequences of the micro-batch in order; none where it only fills a slot.
        batch: the micro-batch, or this context-parallel rank's part of it.
        version: of the weights at the start of the rollout batch.
    """

    def behind(ref: SampleRef) -> Tensor:
        found = torch.zeros(ref.answer_length)
        for segment in ref.segments:
            found[segment.start : segment.end] = version - segment.version
        return found

    return place_values(refs, batch, behind)
