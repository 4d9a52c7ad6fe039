"""The reference core attention: packed (THD) and context-parallel, in plain torch.

Sharded exactly as Transformer Engine shards: each sequence, padded to a multiple of 2*CP, is cut in 2*CP chunks and
rank r holds chunks r and 2*CP-1-r. Keys and values are gathered over the context-parallel ranks; each query attends
to the positions of its own sequence that are not after it.

Written out (scores, softmax, weighted sum) so that the pass with and the pass without gradients are the same
arithmetic, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORE_BUDGET = 2**26
"""Most attention scores (bucket x heads x queries x keys) alive at one time; longer queries go block by block."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, attended to as one padded batch."""

    queries: Tensor
    """[B, Lq] index of each query among the local tokens; T_local marks padding."""
    keys: Tensor
    """[B, Lk] index of each key among the gathered tokens; T marks padding."""
    query_positions: Tensor
    """[B, Lq] position in the sequence, -1 for padding."""
    key_positions: Tensor
    """[B, Lk] position in the sequence, beyond every query's for padding."""


@dataclass
class PackedBatchParams(PackedSeqParams):
    """Megatron's description of a pack, with the index sets of the reference attention beside it."""

    buckets: tuple[Bucket, ...] = field(default=())


def zigzag_indices(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """[T / size] positions in the pack that context-parallel rank `rank` holds, in its local order.

    Args:
        cu_seqlens: [S+1] padded sequence starts; each length divides by 2*size.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def plan_buckets(cu_seqlens: Tensor, rank: int, size: int, device: torch.device) -> tuple[Bucket, ...]:
    """Index sets for one pack, computed once for all layers; within a bucket lengths differ by less than twice."""
    starts, lengths = cu_seqlens[:-1].tolist(), (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    total = int(cu_seqlens[-1])
    owner = torch.empty(total, dtype=torch.long)
    for other in range(size):
        owner[zigzag_indices(cu_seqlens, other, size)] = torch.arange(
            other * (total // size), (other + 1) * (total // size)
        )
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length:
            groups.setdefault(length.bit_length(), []).append(sequence)
    buckets = []
    for members in groups.values():
        longest = max(lengths[sequence] for sequence in members)
        queries = torch.full((len(members), longest // size), total // size)
        query_positions = torch.full((len(members), longest // size), -1)
        keys = torch.full((len(members), longest), total)
        key_positions = torch.full((len(members), longest), longest)
        for row, sequence in enumerate(members):
            start, length = starts[sequence], lengths[sequence]
            keys[row, :length] = owner[start : start + length]
            key_positions[row, :length] = torch.arange(length)
            own = zigzag_indices(torch.tensor([0, length]), rank, size)
            query_positions[row, : len(own)] = own
            queries[row, : len(own)] = start // size + torch.arange(len(own))
        buckets.append(Bucket(*(part.to(device) for part in (queries, keys, query_positions, key_positions))))
    return tuple(buckets)


class ReferenceAttention(MegatronModule):
    """Core attention of the reference spec: causal, grouped-query, packed, context-parallel."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedBatchParams | None = None,
    ) -> Tensor:
        """Attend within each packed sequence.

        Args:
            query: [T_local, heads, d]; `key` and `value`: [T_local, groups, d].

        Returns:
            [T_local, heads * d].
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if self.context_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(
                    part.contiguous(), tensor_parallel_output_grad=True, group=self.context_group
                )
                for part in (key, value)
            )
        output = torch.zeros_like(query)
        for bucket in packed_seq_params.buckets:
            attended = self._attend(
                _pick(query, bucket.queries), _pick(key, bucket.keys), _pick(value, bucket.keys), bucket
            )
            real = bucket.queries < len(query)
            output = output.index_put((bucket.queries[real],), attended[real])
        return output.reshape(len(query), -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """[B, Lq, heads, d] of one bucket, query block by query block where the scores would not fit."""
        size, num_queries, heads, _ = query.shape
        block = max(1, SCORE_BUDGET // (size * heads * key.shape[1]))
        if num_queries <= block:
            return self._attend_block(query, key, value, bucket.query_positions, bucket.key_positions)
        parts = [
            checkpoint(self._attend_block, q, key, value, at, bucket.key_positions, use_reentrant=False)
            for q, at in zip(query.split(block, 1), bucket.query_positions.split(block, 1), strict=True)
        ]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def _attend_block(self, query: Tensor, key: Tensor, value: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
        size, num_queries, heads, width = query.shape
        groups = key.shape[2]
        # [B, groups, heads/groups * Lq, d] against [B, groups, Lk, d]: the heads of a group share its keys.
        folded = query.view(size, num_queries, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
        scores = folded.reshape(size, groups, -1, width) @ key.permute(0, 2, 3, 1)
        scores = scores.view(size, groups, heads // groups, num_queries, -1) * self.scale
        hidden = key_at[:, None, :] > query_at[:, :, None].clamp(min=0)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        weights = _softmax(scores).view(size, groups, -1, scores.shape[-1])
        mixed = (weights @ value.transpose(1, 2)).view(size, groups, heads // groups, num_queries, width)
        return mixed.permute(0, 3, 1, 2, 4).reshape(size, num_queries, heads, width)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax in at least float32, returned in the type of its input."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of `tokens`, with a row of zeros for the index one past the last."""
    padded = torch.cat([tokens, tokens.new_zeros((1, *tokens.shape[1:]))])
    return padded[index]
