"""How old the weights of each token are, in every cut of a pack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gspo_megatron.data.packing import PackedBatch, collate
from gspo_megatron.policy.attention import zigzag_indices
from gspo_megatron.trainer.token_staleness import token_staleness
from gspo_megatron.types import Sample, SampleRef, Segment


def sample(prompt: int, *segments: Segment) -> Sample:
    length = segments[-1].end
    ref = SampleRef("", 0, 0, prompt, length, 0.0, "stop", segments)
    trained = np.arange(prompt + length) >= prompt
    return Sample(np.arange(prompt + length, dtype=np.int32), trained, np.zeros(prompt + length, np.float32), ref)


def cut(packed: PackedBatch, context: int, rank: int) -> Any:
    """What of a micro-batch is read: where its sequences start, and which places of the pack are on this rank."""
    starts = torch.as_tensor(packed.cu_seqlens)
    return SimpleNamespace(params=SimpleNamespace(cu_seqlens_q=starts), indices=zigzag_indices(starts, rank, context))


@pytest.mark.parametrize("context", [1, 2])
def test_each_target_has_the_age_of_its_segment(context: int) -> None:
    samples = [sample(3, Segment(5, 0, 2), Segment(7, 2, 4)), sample(1, Segment(6, 0, 3))]
    packed = collate(samples, 4 * context)
    places: list[int] = []
    ages: list[float] = []
    for rank in range(context):
        part = cut(packed, context, rank)
        found = token_staleness([one.ref for one in samples], part, 7)
        assert found.shape == part.indices.shape
        places += part.indices.tolist()
        ages += found.tolist()
    whole = [age for _, age in sorted(zip(places, ages, strict=True))]
    # The first response token is the target of the last prompt token.
    assert whole[:8] == [0, 0, 2, 2, 0, 0, 0, 0]
    second = int(packed.cu_seqlens[1])
    assert whole[second : second + 4] == [1, 1, 1, 0]


def test_a_filled_slot_has_no_age() -> None:
    assert token_staleness([], cut(collate([]), 1, 0), 7).tolist() == [0.0]
