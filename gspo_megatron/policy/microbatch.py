"""A packed batch as one rank sees it: cut over the context-parallel ranks, on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.data.packing import PackedBatch
from gspo_megatron.objective.metrics import length_bucket
from gspo_megatron.policy.attention import PackedBatchParams, plan_buckets, positions_of, zigzag_indices
from gspo_megatron.policy.mesh import ContextShare

ROPE_LENGTH_STEP = 1024
"""Rotary tables are cached by length; rounding up to this keeps each new longest sequence from making one."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of one forward pass on this rank. T_local = T / ranks that share the pack."""

    token_ids: Tensor
    """[T_local] int64."""
    targets: Tensor
    """[T_local] int64, the token each position predicts."""
    loss_mask: Tensor
    """[T_local] bool, True where the target is trained."""
    rollout_logprobs: Tensor
    """[T_local] float32, aligned with `targets`."""
    cu_seqlens: Tensor
    """[S+1] int32, starts of the sequences among the local tokens."""
    indices: Tensor
    """[T_local] int64, place of each local token in the whole pack."""
    params: PackedBatchParams
    """The pack as Megatron wants it: global padded lengths."""
    share: ContextShare
    """Which part of the pack this is."""
    routes: Tensor | None = None
    """[T_local, layers, k] int16, the sampler's experts, -1 = not recorded; None = it reported none."""

    def length_buckets(self) -> Tensor:
        """[T_local] int64, place in the objective's `BUCKET_NAMES` of the padded length of each token's sequence."""
        buckets = length_bucket(self.params.cu_seqlens_q.diff())
        return buckets.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.token_ids))


def place(batch: PackedBatch, share: ContextShare, device: torch.device) -> MicroBatch:
    """This rank's part of a packed batch."""
    cu_seqlens = torch.as_tensor(batch.cu_seqlens, dtype=torch.int32)
    keep = zigzag_indices(cu_seqlens, share.rank, share.size)

    def cut(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values)[keep].to(device=device, dtype=dtype)

    params = _describe(cu_seqlens, keep, share, device)
    return MicroBatch(
        token_ids=cut(batch.token_ids, torch.int64),
        targets=cut(batch.targets, torch.int64),
        loss_mask=cut(batch.loss_mask, torch.bool),
        rollout_logprobs=cut(batch.rollout_logprobs, torch.float32),
        cu_seqlens=params.cu_seqlens_q // share.size,
        indices=keep.to(device),
        params=params,
        share=share,
        routes=None if batch.routes is None else cut(batch.routes, torch.int16),
    )


def narrow(batch: MicroBatch, starts: Sequence[int], members: Sequence[int]) -> tuple[MicroBatch, Tensor]:
    """The pack that holds only some of the sequences of a pack.

    Args:
        batch: the pack.
        starts: [S+1] its `cu_seqlens`, on the host.
        members: which of the S sequences, in order.

    Returns:
        The new pack, without routes, and [T_new] int64: where each of its tokens is among the local ones of the old.
    """
    device, share = batch.token_ids.device, batch.share
    lengths = [share.size * (starts[member + 1] - starts[member]) for member in members]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    keep = zigzag_indices(cu_seqlens, share.rank, share.size)
    rows = torch.cat([torch.arange(starts[member], starts[member + 1]) for member in members]).to(device)
    params = _describe(cu_seqlens, keep, share, device)
    new = MicroBatch(
        token_ids=batch.token_ids[rows],
        targets=batch.targets[rows],
        loss_mask=batch.loss_mask[rows],
        rollout_logprobs=batch.rollout_logprobs[rows],
        cu_seqlens=params.cu_seqlens_q // share.size,
        indices=keep.to(device),
        params=params,
        share=share,
    )
    return new, rows


def _describe(cu_seqlens: Tensor, keep: Tensor, share: ContextShare, device: torch.device) -> PackedBatchParams:
    """A pack as Megatron wants it; `cu_seqlens` [S+1] and `keep` [T_local] are on the host."""
    longest = int(cu_seqlens.diff().max())
    # Transformer Engine keeps the two groups of a2a+p2p that it was made with; any other is replaced here.
    group: Any = None if share.is_two_level else share.group  # where megatron declares a group, it takes None too
    on_device = cu_seqlens.to(device)
    rope_length = -(-longest // ROPE_LENGTH_STEP) * ROPE_LENGTH_STEP
    return PackedBatchParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=on_device,
        cu_seqlens_kv_padded=on_device,
        max_seqlen_q=rope_length,
        max_seqlen_kv=rope_length,
        # The padding of a sequence is a part of it. Left open, Transformer Engine guesses from which tensors are the
        # same object.
        pad_between_seqs=False,
        # Attention exchanges keys and values in this group, whatever group its module was made with.
        cp_group=group,
        local_cp_size=None if share.is_two_level else share.size,  # pyright: ignore[reportArgumentType]
        positions=positions_of(cu_seqlens, keep).to(device),
        buckets=plan_buckets(cu_seqlens, share.rank // share.heads * share.heads, share.size, device, share.heads),
        head_group=share.head_group,
        key_group=share.key_group,
    )
