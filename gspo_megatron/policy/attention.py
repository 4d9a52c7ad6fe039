"""The reference core attention: packed (THD) and context-parallel, in plain torch.

Sharded exactly as Transformer Engine shards: each sequence, padded to a multiple of 2*CP, is cut in 2*CP chunks and
rank r holds chunks r and 2*CP-1-r. Keys and values are gathered over the ranks that share the pack; or these exchange
heads for tokens and back, as Transformer Engine's `a2a` does; or consecutive ones exchange heads, and gather what the
others hold. Each query attends to the positions of its own sequence that are not after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
SCORE_BUDGET = 2**20
"""Most attention scores (bucket x heads x queries x keys) of a block of queries; a block has at least one query."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, attended to as one padded batch."""

    queries: Tensor
    """[B, Lq] index of each query among the tokens of this rank, or of the ranks that exchange heads, one after the
    other; their number marks padding."""
    keys: Tensor
    """[B, Lk] index of each key among the gathered tokens; T marks padding."""
    query_positions: Tensor
    """[B, Lq] position in the sequence, -1 for padding."""
    key_positions: Tensor
    """[B, Lk] position in the sequence, beyond every query's for padding. Of real keys it is their index."""
    first_hidden: IntArray
    """[Lq] keys before this index are seen by the queries of all B sequences."""
    last_seen: IntArray
    """[Lq] keys after this index are seen by none."""

    def blocks(self, heads: int) -> Iterator[tuple[slice, int]]:
        """Blocks of queries, and how many keys each needs."""
        size, length = self.query_positions.shape
        start = 0
        while start < length:
            # Later queries see more keys: the block is as large as its last query allows.
            seen = int(self.last_seen[start:].max()) + 1
            end = min(length, start + max(1, SCORE_BUDGET // (size * heads * seen)))
            yield slice(start, end), int(self.last_seen[start:end].max()) + 1
            start = end


@dataclass
class PackedBatchParams(PackedSeqParams):
    """Megatron's description of a pack, with the index sets that its layers would ask the device for."""

    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[T_local] place of each token in its own sequence."""
    buckets: tuple[Bucket, ...] = field(default=())
    head_group: Any = None
    """Ranks that exchange heads; None where each keeps all heads of its tokens."""
    key_group: Any = None
    """Ranks over which keys and values are gathered after that; None where all are there."""


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


def positions_of(cu_seqlens: Tensor, indices: Tensor) -> Tensor:
    """[T_local] places in their own sequences of the tokens at `indices` of the pack."""
    return indices - cu_seqlens[torch.searchsorted(cu_seqlens, indices, right=True) - 1]


def plan_buckets(cu_seqlens: Tensor, rank: int, size: int, device: torch.device, count: int = 1) -> tuple[Bucket, ...]:
    """Index sets for one pack, computed once for all layers; within a bucket lengths differ by less than twice.

    Args:
        cu_seqlens: [S+1] padded sequence starts.
        rank: the first of the ranks whose queries attend here.
        size: ranks that share the pack.
        device: of the result.
        count: how many ranks' queries attend here.
    """
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
        queries = torch.full((len(members), count * longest // size), count * total // size)
        query_positions = torch.full((len(members), count * longest // size), -1)
        keys = torch.full((len(members), longest), total)
        key_positions = torch.full((len(members), longest), longest)
        for row, sequence in enumerate(members):
            start, length = starts[sequence], lengths[sequence]
            keys[row, :length] = owner[start : start + length]
            key_positions[row, :length] = torch.arange(length)
            own, order = torch.cat(
                [zigzag_indices(torch.tensor([0, length]), one, size) for one in range(rank, rank + count)]
            ).sort()
            query_positions[row, : len(own)] = own
            held = torch.cat([(at * total + start) // size + torch.arange(length // size) for at in range(count)])
            queries[row, : len(own)] = held[order]
        seen = query_positions.clamp(min=0)
        parts = (part.to(device) for part in (queries, keys, query_positions, key_positions))
        buckets.append(Bucket(*parts, first_hidden=seen.amin(0).numpy() + 1, last_seen=seen.amax(0).numpy()))
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
        heads, keys = packed_seq_params.head_group, packed_seq_params.key_group
        if heads is not None:
            query, key, value = (_spread_heads(part, heads) for part in (query, key, value))
        if keys is not None:
            key, value = (
                gather_from_sequence_parallel_region(part.contiguous(), tensor_parallel_output_grad=True, group=keys)
                for part in (key, value)
            )
        # The last row takes the padding of the buckets. Picking the real rows would ask the device how many there are.
        output = query.new_zeros((len(query) + 1, *query.shape[1:]))
        for bucket in packed_seq_params.buckets:
            attended = self._attend(
                _pick(query, bucket.queries), _pick(key, bucket.keys), _pick(value, bucket.keys), bucket
            )
            output = output.index_put((bucket.queries,), attended)
        attended = output[:-1]
        return (attended if heads is None else _collect_heads(attended, heads)).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """[B, Lq, heads, d] of one bucket."""
        by_group = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)
        parts = (part.contiguous() for part in (by_group, key.transpose(1, 2), value.transpose(1, 2)))
        attended: Tensor = _BlockedAttention.apply(*parts, bucket, self.scale)
        return attended.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _spread_heads(tokens: Tensor, group: Any) -> Tensor:
    """[T_local, heads, d] of this rank -> [n * T_local, heads / n, d] of the n ranks of the group, in their order."""
    size = group.size()
    return all_to_all(group, tokens.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1))


def _collect_heads(tokens: Tensor, group: Any) -> Tensor:
    """The way back of `_spread_heads`."""
    size = group.size()
    return all_to_all(group, tokens).unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


class _BlockedAttention(torch.autograd.Function):
    """Attention of one bucket, block of queries by block, each with the keys that it can see.

    Written out so that the pass with and the pass without gradients are the same arithmetic, bit for bit. The backward
    pass makes the weights again, unless one block is all: what is kept between the passes is linear in the tokens.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scale: float) -> Tensor:
        """query [B, groups, heads of a group, Lq, d], key and value [B, groups, Lk, d] -> as query."""
        ctx.bucket, ctx.scale = bucket, scale
        ctx.blocks = list(bucket.blocks(query.shape[1] * query.shape[2]))
        output, weights = torch.empty_like(query), None
        for rows, seen in ctx.blocks:
            weights = _weights(query, key, bucket, scale, rows, seen)
            output[..., rows, :] = (weights @ value[:, :, :seen]).view_as(query[..., rows, :])
        ctx.save_for_backward(query, key, value, output, weights if len(ctx.blocks) == 1 else None)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As in any softmax, the gradient of a score is weight * (gradient of the weight - its mean in the row)."""
        query, key, value, output, kept = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for rows, seen in ctx.blocks:
            weights = _weights(query, key, ctx.bucket, ctx.scale, rows, seen) if kept is None else kept
            grad = grads[0][..., rows, :].flatten(2, 3)
            grad_value[:, :, :seen] += weights.transpose(2, 3) @ grad
            mean = (grad * output[..., rows, :].flatten(2, 3)).sum(-1, keepdim=True)
            grad_scores = (grad @ value[:, :, :seen].transpose(2, 3)).sub_(mean).mul_(weights).mul_(ctx.scale)
            grad_query[..., rows, :] = (grad_scores @ key[:, :, :seen]).view_as(query[..., rows, :])
            grad_key[:, :, :seen] += grad_scores.transpose(2, 3) @ query[..., rows, :].flatten(2, 3)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _weights(query: Tensor, key: Tensor, bucket: Bucket, scale: float, rows: slice, seen: int) -> Tensor:
    """[B, groups, heads of a group * block, seen]: the heads of a group share its keys."""
    scores = (query[..., rows, :].flatten(2, 3) @ key[:, :, :seen].transpose(2, 3)).mul_(scale)
    first = int(bucket.first_hidden[rows].min())
    if first < seen:
        hidden = bucket.key_positions[:, None, first:seen] > bucket.query_positions[:, rows, None].clamp(min=0)
        by_head = scores.unflatten(2, (query.shape[2], -1))
        by_head[..., first:].masked_fill_(hidden[:, None, None], float("-inf"))
    return _softmax(scores)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax in at least float32, returned in the type of its input."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of `tokens`, with a row of zeros for the index one past the last."""
    padded = torch.cat([tokens, tokens.new_zeros((1, *tokens.shape[1:]))])
    return padded[index]
