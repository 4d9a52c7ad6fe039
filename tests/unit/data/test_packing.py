"""Packing: nothing lost, no bin too full, ranks even; and rows whose index t predicts token t + 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.packing import collate, imbalance, least_imbalance, pack, unpack
from gspo_megatron.types import Sample, SampleRef


def attention_cost(length: int) -> float:
    """FLOPs of Qwen3-30B-A3B: 6.08e9 a token and 393,216 a pair of tokens."""
    return 6.08e9 * length + 393_216 * length**2


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1000), max_size=60),
    groups=st.integers(1, 3),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(1000, 3000),
    multiple=st.sampled_from([1, 1, 2, 3]),
)
def test_every_sequence_once_no_bin_too_full_none_below_the_bound(
    lengths: list[int], groups: int, ranks: int, max_tokens: int, multiple: int
) -> None:
    slots = pack(lengths, attention_cost, groups * ranks, max_tokens, ranks, slot_multiple=multiple)
    assert sorted(index for slot in slots for members in slot for index in members) == list(range(len(lengths)))
    assert len(slots) % multiple == 0
    assert all(len(slot) == groups * ranks for slot in slots)
    assert all(sum(lengths[index] for index in members) <= max_tokens for slot in slots for members in slot)
    if lengths:
        costs = [attention_cost(length) for length in lengths]
        bound = least_imbalance(lengths, costs, groups * ranks, max_tokens, ranks)
        assert imbalance(slots, costs, ranks) >= bound * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60), ranks=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_the_same_input_gives_the_same_bins(lengths: list[int], ranks: int, seed: int) -> None:
    """Whatever numpy's global generator holds: every rank packs for itself."""
    first = pack(lengths, attention_cost, 2 * ranks, 1500, ranks)
    np.random.seed(seed)
    assert pack(lengths, attention_cost, 2 * ranks, 1500, ranks) == first


@pytest.mark.parametrize("cost", [lambda length: 1.0, lambda length: 0.0, lambda length: 1e6 / length])
def test_any_cost_is_spread(cost) -> None:
    """Costs that do not rise with tokens, none at all among them."""
    lengths = [900, 20, 500, 500, 70, 800, 1, 300]
    slots = pack(lengths, cost, 4, 1000, ranks_per_expert_group=2)
    assert sorted(index for slot in slots for members in slot for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= 1000 for slot in slots for members in slot)


def test_a_pipeline_gets_slots_of_like_length_or_shorter_ones() -> None:
    """With a bubble as long as 15 of the longest slots, an extra slot that shortens the longest is worth its price."""
    lengths = draw_lengths("agent", 128, 1)
    costs = np.array([attention_cost(length) for length in lengths])

    def longest(bubble_slots: float) -> float:
        slots = pack(lengths, attention_cost, 8, 131_072, 8, bubble_slots=bubble_slots)
        return max(costs[members].sum() for slot in slots for members in slot)

    assert longest(15.0) <= longest(0.0)


def test_nothing_to_pack() -> None:
    assert pack([], attention_cost, 4, 100) == []


def test_fewer_sequences_than_ranks_leave_empty_lists() -> None:
    assert sorted(pack([5, 5], attention_cost, 4, 100)[0]) == [[], [], [0], [1]]


def test_a_sequence_that_fits_nowhere_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"sequence 1 has 101 tokens, a micro-batch takes 1 to 100; raise trainer.micro_batch_tokens"
    ):
        pack([7, 101], attention_cost, 2, 100)
    with pytest.raises(ValueError, match="ranks_per_expert_group=3 does not divide num_ranks=4"):
        pack([7], attention_cost, 4, 100, ranks_per_expert_group=3)


def test_imbalance_by_hand() -> None:
    """Rank totals are even, 4 and 4, but in each slot one rank waits 2 of 3 units for the other: (3 + 3) / 4."""
    slots = [[[0], [1]], [[2], [3]]]
    costs = [3.0, 1.0, 1.0, 3.0]
    assert imbalance(slots, costs, ranks_per_expert_group=1) == 1.0
    assert imbalance(slots, costs, ranks_per_expert_group=2) == 1.5


def test_slots_of_an_expert_group_meet_their_like() -> None:
    """Two dear and two cheap sequences of equal bins: the dear ones share a slot."""
    slots = pack([90, 10, 90, 10], lambda length: length**2, 2, 100, ranks_per_expert_group=2)
    assert imbalance(slots, [8100.0, 100.0, 8100.0, 100.0], 2) == 1.0


SHAPES = {"math": (9_000, 1.0), "agent": (24_000, 0.75)}
MODELS = {"30B": (6.08e9, 393_216.0), "235B": (43.14e9, 1_540_096.0)}
LIMITS = {512: 1.01, 128: 1.05, 64: 1.06}
"""Sequences -> most of W over the bound in one draw; tools/bench_packing.py has the means."""
GREEDY = json.loads((Path(__file__).parent / "packing_greedy.json").read_text())
"""W of two draws of each cell with the packer of 5e4009c: most expensive sequence first, then the best exchanges."""


def draw_lengths(shape: str, count: int, seed: int) -> list[int]:
    """Lognormal lengths cut at 100K: `math` has median 9K and sigma 1, `agent` median 24K and sigma 0.75."""
    median, sigma = SHAPES[shape]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn, 64, 100_000).astype(int).tolist()


@pytest.mark.parametrize("cell", GREEDY)
def test_long_tails_come_near_the_bound_and_beat_the_greedy_packer(cell: str) -> None:
    shape, model, *numbers = cell.split()
    count, span = map(int, numbers)
    linear, quadratic = MODELS[model]

    def cost(length: int) -> float:
        return linear * length + quadratic * length**2

    for seed, before in enumerate(GREEDY[cell]):
        lengths = draw_lengths(shape, count, seed)
        costs = [cost(length) for length in lengths]
        slots = pack(lengths, cost, 8, 131_072, span)
        bound = least_imbalance(lengths, costs, 8, 131_072, span)
        reached = imbalance(slots, costs, span)
        assert bound * (1 - 1e-9) <= reached <= LIMITS[count] * bound
        # The search is random and short: it may end two parts in ten thousand above another packer.
        assert reached <= before + 2e-4


def make_sample(prompt: int, answer: int, first: int = 100) -> Sample:
    """Tokens first, first+1, ...; each trained token's log-prob is minus its id."""
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    mask = np.arange(prompt + answer) >= prompt
    ref = SampleRef(f"{first}.bin", first, 0, prompt, answer, 0.0, "stop", ())
    return Sample(ids, mask, np.where(mask, -ids, 0).astype(np.float32), ref)


def test_collate_by_hand() -> None:
    """Prompt 100 101 with answer 102 103 104, prompt 200 with answer 201, padded to multiples of 4."""
    batch = collate([make_sample(2, 3), make_sample(1, 1, first=200)], pad_multiple=4)
    assert batch.token_ids.tolist() == [100, 101, 102, 103, 104, 0, 0, 0, 200, 201, 0, 0]
    assert batch.targets.tolist() == [101, 102, 103, 104, 0, 0, 0, 0, 201, 0, 0, 0]
    assert batch.loss_mask.astype(int).tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert batch.rollout_logprobs.tolist() == [0, -102, -103, -104, 0, 0, 0, 0, -201, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 8, 12]
    assert batch.lengths.tolist() == [5, 2]


samples_strategy = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=6)


@given(samples_strategy, st.sampled_from([1, 2, 8]))
def test_what_is_packed_comes_out_again(shapes: list[tuple[int, int]], multiple: int) -> None:
    samples = [make_sample(*shape, first=100 * (i + 1)) for i, shape in enumerate(shapes)]
    batch = collate(samples, multiple)
    total = int(batch.cu_seqlens[-1])
    assert {
        len(getattr(batch, name)) for name in ("token_ids", "targets", "positions", "loss_mask", "rollout_logprobs")
    } == {total}
    assert all(np.diff(batch.cu_seqlens) % multiple == 0)
    for sample, logprobs, targets in zip(
        samples, unpack(batch, batch.rollout_logprobs), unpack(batch, batch.targets), strict=True
    ):
        assert logprobs.tolist() == sample.rollout_logprobs.tolist()
        assert targets[1:].tolist() == sample.token_ids[1:].tolist()
    assert batch.loss_mask.sum() == sum(sample.loss_mask.sum() for sample in samples)


@pytest.mark.parametrize("name", ["loss_mask", "rollout_logprobs", "targets"])
def test_a_shift_by_one_token_is_seen(name: str) -> None:
    """The alignment that the tests above check would not survive one token either way."""
    batch = collate([make_sample(2, 3), make_sample(1, 4, first=200)])
    assert is_aligned(batch)
    for step in (-1, 1):
        assert not is_aligned(dataclasses.replace(batch, **{name: np.roll(getattr(batch, name), step)}))


def is_aligned(batch) -> bool:
    """Trained targets carry their own log-prob (minus the id) and are the next token of the row."""
    trained = batch.loss_mask
    return bool(
        (batch.rollout_logprobs[trained] == -batch.targets[trained]).all()
        and (batch.targets[trained] == np.roll(batch.token_ids, -1)[trained]).all()
        and (batch.rollout_logprobs[~trained] == 0).all()
    )


def test_an_idle_rank_gets_one_row_of_padding() -> None:
    batch = collate([], pad_multiple=8)
    assert (len(batch.token_ids), batch.cu_seqlens.tolist(), batch.loss_mask.any()) == (8, [0, 8], False)
    assert (batch.lengths.tolist(), unpack(batch, batch.rollout_logprobs)) == ([0], [])


def test_a_trained_first_token_is_refused() -> None:
    sample = make_sample(1, 2)
    with pytest.raises(ValueError, match=r"first token of 100.bin is marked as trained"):
        collate([dataclasses.replace(sample, loss_mask=np.ones(3, dtype=bool))])
