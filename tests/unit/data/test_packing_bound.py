"""The lower bound of packing: below the best of all packings where they can be counted, reached where it can be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.balance_bound import lower_bound, most_content


def partitions(items: tuple[int, ...], most: int) -> Iterator[list[list[int]]]:
    """Every way to cut items into sets of at most `most`."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for parts in partitions(rest, most):
        yield [[first], *parts]
        for place, part in enumerate(parts):
            if len(part) < most:
                yield [*parts[:place], [first, *part], *parts[place + 1 :]]


def all_bins(tokens: list[int], max_tokens: int) -> Iterator[list[list[int]]]:
    """Every way to cut sequences into bins that hold them."""
    for bins in partitions(tuple(range(len(tokens))), len(tokens)):
        if all(sum(tokens[index] for index in members) <= max_tokens for members in bins):
            yield bins


def best_time(tokens: list[int], costs: list[int], groups: int, ranks: int, max_tokens: int) -> int:
    """The least time of the slowest group over every packing: all bins, all slots of them, all groups of slots."""
    best = sum(costs)
    for bins in all_bins(tokens, max_tokens):
        loads = [sum(costs[index] for index in members) for members in bins]
        for slots in partitions(tuple(range(len(bins))), ranks):
            times = [max(loads[index] for index in slot) for slot in slots]
            for code in range(groups ** len(times)):
                totals = [0] * groups
                for time in times:
                    code, group = divmod(code, groups)
                    totals[group] += time
                best = min(best, max(totals))
    return best


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]),
    max_tokens=st.integers(100, 160),
    quadratic=st.sampled_from([0, 1, 30]),
)
def test_no_packing_of_all_is_below(tokens: list[int], shape: tuple[int, int], max_tokens: int, quadratic: int) -> None:
    costs = [100 * length + quadratic * length**2 for length in tokens]
    bound = lower_bound(np.array(tokens), np.array(costs), *shape, max_tokens)
    assert bound <= best_time(tokens, costs, *shape, max_tokens) * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    costs=st.lists(st.integers(0, 10_000), min_size=6, max_size=6),
    max_tokens=st.integers(100, 160),
    count=st.integers(1, 3),
    above=st.integers(0, 5_000),
)
def test_no_bins_of_all_hold_more(tokens: list[int], costs: list[int], max_tokens: int, count: int, above: int) -> None:
    """Any costs, also cheap long sequences beside dear short ones."""
    costs = costs[: len(tokens)]
    limit = max(costs) + above
    most = max(
        sum(sorted(min(limit, sum(costs[index] for index in members)) for members in bins)[-count:])
        for bins in all_bins(tokens, max_tokens)
    )
    assert most_content(np.array(tokens), np.array(costs), count, max_tokens, limit) >= most


@pytest.mark.parametrize(
    ("tokens", "shape", "time"),
    [
        # All costs over two ranks.
        ([50, 50, 50, 50], (1, 2), 5_000),
        # The longest sequence alone.
        ([100, 10], (1, 2), 10_000),
        # Three sequences on two ranks: two of them meet.
        ([80, 80, 80], (2, 1), 12_800),
        # Beside the sequence of 100 a bin holds two of 50, half as much; the other eight take as long again, two by
        # two on two ranks. The mean alone is 17,500.
        ([100, *[50] * 10], (1, 2), 20_000),
        # Sequences of 100 and 60 leave no room for each other, and a third such one needs a second slot.
        ([100, 60, 60], (1, 2), 13_600),
    ],
)
def test_each_bound_is_reached_by_hand(tokens: list[int], shape: tuple[int, int], time: int) -> None:
    """Cost is the square of the length, a bin takes 100 tokens."""
    lengths = np.array(tokens)
    assert lower_bound(lengths, lengths**2, *shape, 100) == pytest.approx(time)
