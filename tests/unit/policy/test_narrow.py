"""A pack cut to some of its sequences is the pack that one would have made of these alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.parallel import Layout
from gspo_megatron.policy.mesh import ContextShare
from gspo_megatron.policy.microbatch import MicroBatch, narrow, place
from gspo_megatron.types import Sample, SampleRef

CPU = torch.device("cpu")


def sample(index: int, length: int, generator: np.random.Generator) -> Sample:
    ref = SampleRef("", index, 0, 1, length - 1, 0.0, "stop", ())
    ids = generator.integers(0, 96, length).astype(np.int32)
    return Sample(ids, np.arange(length) > 0, generator.normal(size=length).astype(np.float32), ref)


def tensors(batch: MicroBatch) -> list[torch.Tensor]:
    params = batch.params
    assert params.cu_seqlens_q is not None
    found = [batch.token_ids, batch.targets, batch.loss_mask, batch.rollout_logprobs, batch.cu_seqlens, batch.indices]
    found += [params.cu_seqlens_q, params.positions, torch.tensor(params.max_seqlen_q)]
    for bucket in params.buckets:
        found += [bucket.queries, bucket.keys, bucket.query_positions, bucket.key_positions]
        found += [torch.from_numpy(bucket.first_hidden), torch.from_numpy(bucket.last_seen)]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_narrowed_and_made_anew_are_equal(seed: int) -> None:
    generator = np.random.default_rng(seed)
    context = int(generator.choice([1, 2, 4]))
    layout = Layout(world=2 * context, tensor=2, context=context)
    multiple = layout.pad_multiple
    rows = [sample(index, int(generator.integers(2, 90)), generator) for index in range(int(generator.integers(1, 7)))]
    members = sorted(generator.choice(len(rows), int(generator.integers(1, len(rows) + 1)), replace=False).tolist())
    for rank in range(context):
        share = ContextShare(context, rank)
        whole = place(collate(rows, multiple), share, CPU)
        wanted = place(collate([rows[member] for member in members], multiple), share, CPU)
        found, picked = narrow(whole, whole.cu_seqlens.tolist(), members)
        assert all(map(torch.equal, tensors(found), tensors(wanted)))
        assert len(tensors(found)) == len(tensors(wanted))
        assert torch.equal(whole.token_ids[picked], found.token_ids)
        assert len(picked) % layout.tensor == 0, "every tensor-parallel rank gets as many tokens"
