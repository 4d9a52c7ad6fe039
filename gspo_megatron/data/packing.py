"""Sequences into bins, and bins into packed rows.

Legend: S sequences of one micro-batch, T tokens of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gspo_megatron.data.balance import balance, whole_costs
from gspo_megatron.data.balance_bound import lower_bound
from gspo_megatron.data.balance_search import CLOSE_ENOUGH
from gspo_megatron.parallel import round_up
from gspo_megatron.types import Sample, SampleRef

Cost = Callable[[int], float]
"""Tokens of a sequence -> its cost in any unit, e.g. FLOPs; costs in one bin add up."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one data-parallel rank, before any context-parallel cut. Index t predicts token t + 1."""

    token_ids: np.ndarray
    """[T] int64; the padding behind each sequence is 0."""
    positions: np.ndarray
    """[T] int64, from 0 in every sequence, through its padding."""
    targets: np.ndarray
    """[T] int64, the next token of the same sequence; 0 where there is none."""
    loss_mask: np.ndarray
    """[T] bool, True where `targets` is a trained token."""
    rollout_logprobs: np.ndarray
    """[T] float32, the sampler's log-prob of `targets`; 0 where `loss_mask` is False."""
    cu_seqlens: np.ndarray
    """[S+1] int32, 0 to T: where each padded sequence begins. Padding comes last: no real token attends to it."""
    lengths: np.ndarray
    """[S] int32, tokens without padding."""
    refs: tuple[SampleRef, ...]
    """[S], shorter by one in an empty batch: its single sequence is padding."""
    routes: np.ndarray | None = None
    """[T, layers, k] int16, the sampler's experts of `token_ids`, -1 = not recorded; None = no sample has any."""
    ranks: int | None = None
    """Context-parallel ranks that share it; None = all of them."""


def pack(
    lengths: Sequence[int],
    cost: Cost,
    num_ranks: int,
    max_tokens: int,
    ranks_per_expert_group: int = 1,
    slot_multiple: int = 1,
    bubble_slots: float = 0.0,
    close_enough: float = CLOSE_ENOUGH,
) -> list[list[list[int]]]:
    """Spread sequences over ranks and micro-batch slots so that the ranks wait for each other as little as possible.

    Ranks of one expert group exchange tokens in every layer, so within a slot the group is as slow as its slowest
    rank: the sum over slots of that maximum is what is made small, for the slowest group. Deterministic.

    Args:
        lengths: Tokens of each sequence, padding included.
        cost: Cost of a sequence by its number of tokens.
        num_ranks: Data-parallel ranks.
        max_tokens: Most tokens of a bin.
        ranks_per_expert_group: Ranks that share one set of experts and wait for each other in every slot.
        slot_multiple: The number of slots is a multiple of this; an interleaved pipeline schedule takes PP at a time.
        bubble_slots: How often the longest slot is waited for beside its own turn: (PP - 1) / VPP in a pipeline of PP
            stages with VPP model chunks each. Slots of equal stages leave it in the order given: the last stage ends
            after the sum of all slots and PP - 1 times the longest.
        close_enough: Share of the least time that is not worth a search.

    Returns:
        [slot][rank] -> indices into `lengths`; every rank has the same number of slots, some lists may be empty.
    """
    if num_ranks % ranks_per_expert_group:
        raise ValueError(f"ranks_per_expert_group={ranks_per_expert_group} does not divide num_ranks={num_ranks}")
    for index, length in enumerate(lengths):
        if not 0 < length <= max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, a micro-batch takes 1 to {max_tokens}; "
                "raise trainer.micro_batch_tokens or lower rollout.max_answer_tokens"
            )
    if not lengths:
        return []
    tokens = np.asarray(lengths, dtype=np.int64)
    costs = whole_costs([cost(int(length)) for length in lengths])
    shape = (num_ranks // ranks_per_expert_group, ranks_per_expert_group)
    return balance(tokens, costs, shape, max_tokens, slot_multiple, bubble_slots, close_enough)


def imbalance(slots: list[list[list[int]]], costs: Sequence[float], ranks_per_expert_group: int = 1) -> float:
    """Time of the slowest expert group over the time of a perfect spread: 1.0 is perfect, 1.5 wastes a third."""
    per_bin = np.array([[sum(costs[index] for index in members) for members in slot] for slot in slots])
    per_group = per_bin.reshape(len(slots), -1, ranks_per_expert_group).max(axis=2).sum(axis=0)
    return float(per_group.max() / (per_bin.sum() / per_bin.shape[1]))


def least_imbalance(
    lengths: Sequence[int], costs: Sequence[float], num_ranks: int, max_tokens: int, ranks_per_expert_group: int = 1
) -> float:
    """A lower bound on `imbalance` of any slots whose bins take at most `max_tokens`, proved in `lower_bound`."""
    tokens, whole = np.asarray(lengths, dtype=np.int64), whole_costs(costs)
    groups = num_ranks // ranks_per_expert_group
    return lower_bound(tokens, whole, groups, ranks_per_expert_group, max_tokens) / (float(whole.sum()) / num_ranks)


def collate(samples: Sequence[Sample], pad_multiple: int = 1, ranks: int | None = None) -> PackedBatch:
    """Lay sequences end to end, each padded to a multiple; targets are shifted here, before any context-parallel cut.

    No samples gives one sequence of padding without a trained token, so that an idle rank takes part in every
    exchange of its slot.

    Args:
        samples: The sequences of one bin.
        pad_multiple: E.g. 2 * CP * TP with context and sequence parallelism.
        ranks: Context-parallel ranks that share the pack; None = all of them.
    """
    lengths = [len(sample.token_ids) for sample in samples] or [0]
    sizes = [max(round_up(length, pad_multiple), pad_multiple) for length in lengths]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    total = int(starts[-1])
    token_ids, targets = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    loss_mask, rollout_logprobs = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.float32)
    for sample, start, length in zip(samples, starts, lengths, strict=False):
        if sample.loss_mask[0]:
            raise ValueError(f"the first token of {sample.ref.path} is marked as trained, but nothing comes before it")
        here, ahead = slice(start, start + length), slice(start, start + length - 1)
        token_ids[here] = sample.token_ids
        targets[ahead] = sample.token_ids[1:]
        loss_mask[ahead] = sample.loss_mask[1:]
        rollout_logprobs[ahead] = sample.rollout_logprobs[1:]
    return PackedBatch(
        token_ids=token_ids,
        positions=np.concatenate([np.arange(size) for size in sizes]),
        targets=targets,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=starts,
        lengths=np.array(lengths, dtype=np.int32),
        refs=tuple(sample.ref for sample in samples),
        routes=_lay_routes(samples, starts),
        ranks=ranks,
    )


def _lay_routes(samples: Sequence[Sample], starts: np.ndarray) -> np.ndarray | None:
    """The routes of the samples at their places; padding and samples without any hold -1."""
    shapes = {sample.routes.shape[1:] for sample in samples if sample.routes is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"samples of one micro-batch hold routes of shapes {sorted(shapes)}; they are of one model")
    routes = np.full((int(starts[-1]), *shapes.pop()), -1, dtype=np.int16)
    for sample, start in zip(samples, starts, strict=False):
        if sample.routes is not None:
            routes[start : start + len(sample.routes)] = sample.routes
    return routes


def unpack(batch: PackedBatch, values: np.ndarray) -> list[np.ndarray]:
    """Undo the packing of per-target values: [T] -> one [length] a sequence, each value at the token it is about.

    The first token of a sequence has no value and gets 0.
    """
    rows = []
    for start, length in zip(batch.cu_seqlens[: len(batch.refs)], batch.lengths, strict=False):
        row = np.zeros(length, dtype=values.dtype)
        row[1:] = values[start : start + length - 1]
        rows.append(row)
    return rows
