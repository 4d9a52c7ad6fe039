"""Sequences into packs that 1, 2, 4, ... context-parallel ranks share: `pack` where a sequence need not take them all.

Legend: n sequences, D data-parallel rows of C context-parallel ranks each, E expert groups of R rows, K slots. In a
slot all packs of an expert group are of one kind: shared by 2^kind consecutive ranks of a row. A pack has as many
tokens a rank at most as one that all C ranks share, and a slot takes as long as its most expensive pack.

The least kind is tried at every size: at C all packs are shared by a whole row, as without dynamic context parallelism.
So by the costs given the result is not slower than that, but for what the search leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gspo_megatron.data.balance import FEW
from gspo_megatron.data.balance_bound import fewest_bins
from gspo_megatron.data.balance_search import ROUNDS, Search
from gspo_megatron.data.balance_start import BinBuilder
from gspo_megatron.data.context_bound import SharedCost, measure, shared_bound
from gspo_megatron.parallel import Layout, round_up

SLACKS = (1.0, 1.15, 1.4)
"""Room beside a sequence for others that even out its ranks. The longest of those that fit 4 ranks fill them, and so
wait less where 8 share them."""
ROUNDS_OF_MANY = 60
"""Rounds of the search of more than `FEW` sequences, whose times make most of the 50 ms."""


@dataclass(frozen=True, slots=True)
class SharedPack:
    """The sequences of one pack."""

    ranks: int
    """Consecutive context-parallel ranks that share it."""
    members: list[int]
    """Indices of its sequences; empty where ranks only fill a slot."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is packed, sequences in the order of falling cost."""

    sizes: tuple[int, ...]
    """[kinds] ranks that share a pack."""
    tokens: np.ndarray
    """[kinds, n] int64, padded."""
    costs: np.ndarray
    """[kinds, n] int64 in one unit of time."""
    groups: int
    """E."""
    ranks: int
    """R * C: ranks of an expert group on one tensor-parallel place."""
    room: int
    """Most tokens of a rank in a slot."""
    slot_cost: int
    """Time of a slot beside its sequences'."""
    slot_multiple: int
    bubble_slots: float


@dataclass(frozen=True, slots=True)
class _Slots:
    """Packs of a number of slots. A bin is (group, slot, column), flat in that order."""

    kinds: list[int]
    """[K] kind of each slot."""
    home: np.ndarray
    """[n] bin of each sequence; of kind k the first R*C / 2^k columns are in use."""
    loads: np.ndarray
    """[E, K, R*C] int64."""

    def price(self, problem: _Problem) -> float:
        """The slowest group's time, with its pipeline's bubble and what slots cost."""
        times = self.loads.max(axis=2)
        slowest = float((times.sum(axis=1) + problem.bubble_slots * times.max(axis=1)).max())
        return slowest + problem.slot_cost * (len(self.kinds) + problem.bubble_slots)


def pack_shared(
    lengths: Sequence[int],
    cost: SharedCost,
    layout: Layout,
    max_tokens: int,
    slot_cost: float = 0.0,
    rows_per_expert_group: int = 1,
) -> list[list[list[SharedPack]]]:
    """Choose for every sequence how many ranks share it, and for every pack its slot and ranks. Deterministic.

    Args:
        lengths: Tokens of each sequence, without padding.
        cost: Of a sequence by the number of ranks that share it.
        layout: Of the policy; `layout.context_sizes` may share a pack.
        max_tokens: Most tokens of a pack that all context-parallel ranks share.
        slot_cost: Time of a slot that depends on no size.
        rows_per_expert_group: Data-parallel rows that share one set of experts and wait for each other in every slot.

    Returns:
        [slot][data-parallel rank] -> its packs, in the order of the context-parallel ranks, C ranks together.

    Raises:
        ValueError: a sequence does not fit.
    """
    if not lengths:
        return []
    sizes, count = layout.context_sizes, np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((np.arange(len(count)), -count))
    tokens, whole, scale = measure(count[order].tolist(), cost, layout)
    if tokens[-1, 0] > max_tokens // layout.context * layout.context:
        raise ValueError(
            f"sequence {order[0]} has {tokens[-1, 0]} tokens, a micro-batch takes 1 to {max_tokens}; "
            "raise trainer.micro_batch_tokens or lower rollout.max_answer_tokens"
        )
    problem = _Problem(
        sizes,
        tokens,
        # Slots are filled with the longest that fits: a longer sequence is never taken for a cheaper one.
        np.maximum.accumulate(whole[:, ::-1], axis=1)[:, ::-1],
        groups=layout.data // rows_per_expert_group,
        ranks=rows_per_expert_group * layout.context,
        room=max_tokens // layout.context,
        slot_cost=round(slot_cost * scale),
        slot_multiple=layout.pipeline if layout.virtual > 1 else 1,
        bubble_slots=(layout.pipeline - 1) / layout.virtual,
    )
    few = len(lengths) <= FEW
    starts = [
        start
        for slack in (SLACKS if few else SLACKS[:1])
        for least in range(len(sizes))
        for start in _starts(problem, least, slack)
    ]
    bound = shared_bound(tokens, whole, layout, rows_per_expert_group, problem.room)
    found = _search(problem, min(starts, key=lambda it: it.price(problem)), bound, ROUNDS if few else ROUNDS_OF_MANY)
    return _read_out(problem, found, order, layout.context)


def pack_at(packs: Sequence[SharedPack], place: int) -> SharedPack:
    """The pack of one context-parallel rank of a row."""
    end = 0
    for one in packs:
        end += one.ranks
        if place < end:
            return one
    raise ValueError(f"context-parallel rank {place} of a row whose packs take {end} ranks")


def _starts(problem: _Problem, least: int, slack: float) -> list[_Slots]:
    """Packs shared by at least 2^least ranks, for the fewest slots and one set more.

    A sequence is shared by so many ranks that they would have room for `slack` times its tokens.
    """
    rooms = problem.room * np.array(problem.sizes)
    # The least kind from which on every kind takes it.
    need = np.where(slack * problem.tokens > rooms[:, None], np.arange(1, len(rooms) + 1)[:, None], 0).max(axis=0)
    need = np.minimum(need, len(rooms) - 1)
    kinds: list[int] = []
    places = np.full((len(need), 3), -1)
    times = [0] * problem.groups
    rest = np.arange(len(need))
    for kind in range(len(problem.sizes) - 1, least, -1):
        heads = int((need[rest] == kind).sum())
        if not heads:
            continue
        width = problem.ranks // problem.sizes[kind]
        shape = (problem.groups, heads, width)
        builder = BinBuilder(problem.tokens[kind, rest], problem.costs[kind, rest], shape, int(rooms[kind]), times)
        home = builder.fill_for(heads)
        placed = home >= 0
        places[rest[placed]] = _places(home[placed], shape, len(kinds))
        kinds += [kind] * max(builder.closed)
        times, rest = builder.times, rest[~placed]
    return [_finish(problem, least, kinds, places, times, rest, extra) for extra in (0, problem.slot_multiple)]


def _finish(
    problem: _Problem,
    least: int,
    kinds: list[int],
    places: np.ndarray,
    times: list[int],
    rest: np.ndarray,
    extra: int,
) -> _Slots:
    """Spread what is left over slots of the least kind, the fewest that take it and `extra` more."""
    places, width, multiple = places.copy(), problem.ranks // problem.sizes[least], problem.slot_multiple
    tokens, costs, room = problem.tokens[least, rest], problem.costs[least, rest], problem.room * problem.sizes[least]
    bins = fewest_bins(tokens, room)
    slots = round_up(len(kinds) + -(-bins // (problem.groups * width)), multiple) - len(kinds) + extra
    if len(rest):
        while (home := BinBuilder(tokens, costs, (problem.groups, slots, width), room, times).build()) is None:
            slots += multiple
        places[rest] = _places(home, (problem.groups, slots, width), len(kinds))
    every = [*kinds, *[least] * slots]
    home = (places[:, 0] * len(every) + places[:, 1]) * problem.ranks + places[:, 2]
    return _slots(problem, every, home)


def _places(home: np.ndarray, shape: tuple[int, int, int], first_slot: int) -> np.ndarray:
    """[n, 3] group, slot and column of flat bins."""
    group, slot, column = np.unravel_index(home, shape)
    return np.stack([group, slot + first_slot, column], axis=1)


def _slots(problem: _Problem, kinds: list[int], home: np.ndarray) -> _Slots:
    """Add up the costs of each bin."""
    loads = np.zeros(problem.groups * len(kinds) * problem.ranks, dtype=np.int64)
    of_bin = _kinds_of_bins(problem, kinds)
    np.add.at(loads, home, problem.costs[of_bin[home], np.arange(len(home))])
    return _Slots(kinds, home, loads.reshape(problem.groups, len(kinds), problem.ranks))


def _kinds_of_bins(problem: _Problem, kinds: list[int]) -> np.ndarray:
    """[B] the kind of each bin."""
    return np.tile(np.repeat(np.array(kinds, dtype=np.int64), problem.ranks), problem.groups)


def _search(problem: _Problem, start: _Slots, bound: float, rounds: int) -> _Slots:
    """Exchange sequences between bins of all kinds while it pays."""
    of_bin = _kinds_of_bins(problem, start.kinds)
    sizes = np.array(problem.sizes)[of_bin]
    column = np.tile(np.arange(problem.ranks), len(of_bin) // problem.ranks)
    rooms = np.where(column < problem.ranks // sizes, problem.room * sizes, 0)
    home = Search(start.home, problem.tokens, problem.costs, start.loads.shape, rooms, of_bin).run(bound, rounds)
    return _slots(problem, start.kinds, home)


def _read_out(problem: _Problem, slots: _Slots, order: np.ndarray, columns: int) -> list[list[list[SharedPack]]]:
    """Packs by slot and row; the longest slots of a group first, none that is empty in all of them."""
    rows = problem.ranks // columns
    times = slots.loads.max(axis=2)
    count = len(slots.kinds)
    result: list[list[list[SharedPack]]] = [[[] for _ in range(problem.groups * rows)] for _ in range(count)]
    bins: dict[int, list[int]] = {}
    for index, target in enumerate(slots.home.tolist()):
        bins.setdefault(target, []).append(int(order[index]))
    for group in range(problem.groups):
        for place, slot in enumerate(np.argsort(-times[group], kind="stable").tolist()):
            size = problem.sizes[slots.kinds[slot]]
            for column in range(problem.ranks // size):
                members = bins.get((group * count + slot) * problem.ranks + column, [])
                row = group * rows + column * size // columns
                result[place][row].append(SharedPack(size, sorted(members)))
    used = int((times > 0).sum(axis=1).max())
    return result[: round_up(used, problem.slot_multiple)]
