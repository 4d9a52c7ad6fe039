"""Packs that some of the context-parallel ranks share: nothing lost, no rank too full, blocks that are groups."""

from __future__ import annotations

import os
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.context_bound import least_time
from gspo_megatron.data.context_packing import SharedPack, pack_at, pack_shared
from gspo_megatron.data.packing import least_imbalance
from gspo_megatron.parallel import Layout, round_up

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
Slots = list[list[list[SharedPack]]]


def flops(length: int) -> float:
    """Of Qwen3-30B-A3B: 6.08e9 a token and 393,216 a pair of tokens."""
    return 6.08e9 * length + 393_216 * length**2


def even(length: int, ranks: int) -> float:
    """Every rank has its part, and nothing is exchanged."""
    return flops(length) / ranks


def dear(length: int, ranks: int) -> float:
    """Each further rank costs as much as 4,000 tokens of one rank."""
    return flops(length) / ranks + 6.08e9 * 4000 * (ranks - 1)


def times(slots: Slots, lengths: list[int], cost, ranks: int) -> np.ndarray:
    """[slot, rank] of all context- and data-parallel ranks."""
    found = [
        [sum(cost(lengths[i], one.ranks) for i in one.members) for row in slot for one in row for _ in range(one.ranks)]
        for slot in slots
    ]
    return np.array(found).reshape(len(slots), ranks)


def slowest(found: np.ndarray, group: int) -> float:
    """Time of the slowest expert group of `group` ranks."""
    return float(found.reshape(len(found), -1, group).max(axis=2).sum(axis=0).max())


@CASES
@given(
    lengths=st.lists(st.integers(1, 1000), max_size=60),
    groups=st.integers(1, 3),
    rows=st.integers(1, 3),
    context=st.sampled_from([2, 4, 8]),
    tensor=st.sampled_from([1, 2]),
    stages=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    room=st.integers(32, 90),
    cost=st.sampled_from([even, dear]),
)
def test_every_sequence_once_and_no_rank_too_full(
    lengths: list[int], groups: int, rows: int, context: int, tensor: int, stages: tuple[int, int], room: int, cost
) -> None:
    pipeline, virtual = stages
    layout = Layout(
        groups * rows * context * tensor * pipeline, tensor=tensor, pipeline=pipeline, virtual=virtual,
        context=context, dynamic=True,
    )  # fmt: skip
    most = 16 * room * context
    slots = pack_shared(lengths, cost, layout, most, 0.0, rows)
    packs = [one for slot in slots for row in slot for one in row]
    assert sorted(index for one in packs for index in one.members) == list(range(len(lengths)))
    assert len(slots) % (pipeline if virtual > 1 else 1) == 0
    for slot in slots:
        assert len(slot) == groups * rows
        for row in slot:
            assert sum(one.ranks for one in row) == context
            starts = np.cumsum([0, *(one.ranks for one in row)])[:-1]
            assert all(start % one.ranks == 0 for start, one in zip(starts, row, strict=True)), "no group of the mesh"
            held = [pack_at(row, place) for place in range(context)]
            assert all(sum(one is other for other in held) == one.ranks for one in row)
    for one in packs:
        padded = sum(round_up(lengths[index], layout.padding_of(one.ranks)) for index in one.members)
        assert padded / one.ranks <= most / context
    assert pack_shared(lengths, cost, layout, most, 0.0, rows) == slots, "every rank packs for itself"
    if lengths:
        found = times(slots, lengths, cost, layout.data * context)
        assert slowest(found, rows * context) >= least_time(lengths, cost, layout, most, 0.0, rows) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_no_packing_beats_the_bound(seed: int) -> None:
    """All packings of few sequences in two slots, packs of a slot of different sizes among them."""
    generator = np.random.default_rng(seed)
    groups, rows = ((1, 2), (2, 1))[seed % 2]
    layout, room = Layout(4, context=2, dynamic=True), 1000
    lengths = generator.integers(50, 1900, int(generator.integers(3, 6))).tolist()
    cost, slot_cost = (even, dear)[seed // 2 % 2], float(generator.choice([0.0, 1e12]))
    best = float("inf")
    for kinds in product((1, 2), repeat=4):
        # Row-slots of one pack of two ranks, or of two of one: (slot, row, ranks).
        bins = [(slot, row, kind) for (slot, row), kind in zip(product((0, 1), (0, 1)), kinds, strict=True)
                for _ in range(2 // kind)]  # fmt: skip
        chosen = np.array(list(product(range(len(bins)), repeat=len(lengths))))
        spent, filled = np.zeros((len(chosen), len(bins))), np.zeros((len(chosen), len(bins)))
        for index, length in enumerate(lengths):
            for at, (_, _, kind) in enumerate(bins):
                spent[:, at] += np.where(chosen[:, index] == at, cost(length, kind), 0)
                tokens = round_up(length, layout.padding_of(kind)) / kind
                filled[:, at] += np.where(chosen[:, index] == at, tokens, 0)
        slow = np.zeros((len(chosen), 2, groups))
        for at, (slot, row, _) in enumerate(bins):
            slow[:, slot, row // rows] = np.maximum(slow[:, slot, row // rows], spent[:, at])
        whole = slow.sum(axis=1).max(axis=1) + slot_cost * (slow.max(axis=2) > 0).sum(axis=1)
        fitting = whole[(filled <= room).all(axis=1)]
        best = min([best, *fitting.tolist()])
    bound = least_time(lengths, cost, layout, 2 * room, slot_cost, rows)
    assert bound <= best * (1 + 1e-9)


def draw_lengths(count: int, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(9_000), 1.0, count)
    return np.clip(drawn, 64, 100_000).astype(int).tolist()


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("count", [64, 512])
def test_long_tails_are_shared_by_few_ranks_where_that_is_cheaper(count: int, span: int) -> None:
    layout = Layout(64, context=8, dynamic=True)
    for seed in range(2):
        lengths = draw_lengths(count, seed)
        mixed = pack_shared(lengths, dear, layout, 131_072, rows_per_expert_group=span)
        whole = pack_shared(lengths, lambda length, _: dear(length, 8), Layout(64, context=8), 131_072, 0.0, span)
        spent, before = (slowest(times(slots, lengths, dear, 64), 8 * span) for slots in (mixed, whole))
        assert spent < 0.95 * before
        sizes = {one.ranks for slot in mixed for row in slot for one in row if one.members}
        assert len(sizes) > 1, "short and long sequences take different numbers of ranks"


def test_without_a_price_for_ranks_the_time_comes_near_the_bound_of_whole_rows() -> None:
    """Packs of a row, joined, are a pack that the whole row shares: no faster than these can be."""
    layout, lengths = Layout(64, context=8, dynamic=True), draw_lengths(512, 0)
    slots = pack_shared(lengths, even, layout, 131_072, rows_per_expert_group=4)
    costs = [flops(length) for length in lengths]
    bound = least_imbalance(lengths, costs, 8, 131_072, 4) * sum(costs) / 64
    assert bound * (1 - 1e-9) <= slowest(times(slots, lengths, even, 64), 32) <= 1.01 * bound


def test_a_slot_that_costs_is_saved() -> None:
    """Short sequences of two slots fit one slot of packs that more ranks share."""
    layout, lengths = Layout(8, context=8, dynamic=True), [600] * 8 + [700]
    free, priced = (pack_shared(lengths, even, layout, 8_000, price) for price in (0.0, 1e15))
    assert len(priced) == 1
    assert len(free) >= len(priced)


def test_costs_that_fall_with_length_and_no_cost_at_all() -> None:
    layout, lengths = Layout(8, context=4, dynamic=True), [900, 20, 500, 500, 70, 800, 1, 300]
    for cost in (lambda length, ranks: 1e6 / length, lambda length, ranks: 0.0):
        slots = pack_shared(lengths, cost, layout, 1000)
        assert sorted(i for slot in slots for row in slot for one in row for i in one.members) == list(range(8))


def test_nothing_to_pack_and_a_sequence_that_fits_nowhere() -> None:
    layout = Layout(4, context=2, dynamic=True)
    assert pack_shared([], even, layout, 100) == []
    with pytest.raises(ValueError, match=r"sequence 1 has 104 tokens, a micro-batch takes 1 to 100; raise trainer.mic"):
        pack_shared([7, 101], even, layout, 100)
    with pytest.raises(ValueError, match="context-parallel rank 2 of a row whose packs take 2 ranks"):
        pack_at([SharedPack(2, [])], 2)
