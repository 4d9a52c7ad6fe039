"""Advantages of a teacher, one a token: its log-probs out of the sample store, less those of the old policy's pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gspo_megatron.data.store import DamagedSample, SampleStore
from gspo_megatron.objective import teacher_advantages
from gspo_megatron.trainer.batches import MiniBatch, ScoredMicroBatch, TrainingMicroBatch
from gspo_megatron.trainer.response_tokens import place_values
from gspo_megatron.types import SampleRef


def with_teacher_advantages(
    minibatches: Sequence[MiniBatch[ScoredMicroBatch]], store: SampleStore
) -> list[MiniBatch[TrainingMicroBatch]]:
    """Mini-batches whose advantages are [T_local]: log p_teacher - log p_old of each trained token.

    Args:
        minibatches: the whole rollout batch, scored.
        store: holds what the teacher said of each response.

    Raises:
        DamagedSample: a record without it.
    """
    return [one.ready([_ready(micro, store) for micro in one.micro_batches]) for one in minibatches]


def _ready(micro: ScoredMicroBatch, store: SampleStore) -> TrainingMicroBatch:
    mask = micro.batch.loss_mask
    if micro.old is None:  # off the last stage, where nothing is lost
        return micro.ready(torch.zeros(len(mask), dtype=torch.float64, device=mask.device))
    teacher = place_values(micro.refs, micro.batch, lambda ref: _read(ref, store))
    return micro.ready(teacher_advantages(teacher, micro.old.logprobs, mask))


def _read(ref: SampleRef, store: SampleStore) -> Tensor:
    found = store.read_teacher(ref)
    if found is None:
        raise DamagedSample(
            f"sample {ref.path} holds no log-probs of a teacher, which objective.advantage=teacher reads; begin the "
            "run anew"
        )
    return torch.from_numpy(found.copy())
