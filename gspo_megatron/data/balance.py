"""The bin assignment behind `pack`: build bins for a few numbers of slots, keep the best, exchange while it pays.

Legend: n sequences, K slots, R ranks of an expert group, E expert groups, B = E*K*R bins; a bin is
(group, slot, rank), flat in that order, and slots are flat as (group, slot). A slot takes as long as its most
expensive bin, a group as long as its slots together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gspo_megatron.data.balance_bound import fewest_bins, lower_bound
from gspo_megatron.data.balance_search import CLOSE_ENOUGH, Search
from gspo_megatron.data.balance_start import BinBuilder, regroup
from gspo_megatron.parallel import round_up

EXTRA_SLOTS = (0, 1)
"""Slots beyond the fewest that are tried: free room lets short sequences even out the ranks."""
SLOT_PRICE = 5e-4
"""Share of the time that an extra slot has to save: a micro-batch has fixed costs that FLOPs do not show."""
FEW = 128
"""Up to so many sequences every start is searched, beyond only the best."""
WHOLE = 2**48
"""Sum of the costs as whole numbers: exact in float64, and fine beside the cheapest sequence."""


def whole_costs(costs: Sequence[float]) -> np.ndarray:
    """[n] int64 in proportion to `costs`, with the sum `WHOLE` up to rounding.

    Sums of whole numbers do not depend on their order, so each rank finds the same bins on any processor.
    """
    scale = WHOLE / (math.fsum(costs) or 1.0)
    return np.array([round(cost * scale) for cost in costs], dtype=np.int64)


def balance(
    tokens: np.ndarray,
    costs: np.ndarray,
    shape: tuple[int, int],
    max_tokens: int,
    slot_multiple: int = 1,
    bubble_slots: float = 0.0,
    close_enough: float = CLOSE_ENOUGH,
) -> list[list[list[int]]]:
    """[slot][rank] -> sequence indices; see `pack`.

    Args:
        tokens: [n] int64 tokens of each sequence, none above `max_tokens`.
        costs: [n] int64 from `whole_costs`.
        shape: (E, R).
        max_tokens: Most tokens of a bin.
        slot_multiple: Of which the number of slots is a multiple.
        bubble_slots: How often the longest slot is waited for beside its own turn.
        close_enough: Share of the least time that is not worth a search.
    """
    order = np.lexsort((np.arange(len(costs)), -tokens, -costs))
    tokens, costs = tokens[order], costs[order]
    bound = lower_bound(tokens, costs, *shape, max_tokens)
    starts = _starts(tokens, costs, shape, max_tokens, slot_multiple)
    fewest = starts[0].shape[1]
    starts.sort(key=lambda bins: bins.price(fewest, bubble_slots))
    found = [
        _Bins.of(_search(start, tokens, costs, max_tokens, bound, close_enough), costs, start.shape)
        for start in starts[: len(starts) if len(costs) <= FEW else 1]
    ]
    best = min(found, key=lambda bins: bins.price(fewest, bubble_slots))
    home = np.empty_like(best.home)
    home[order] = best.home
    return _read_out(home, best.loads)


def _search(
    start: _Bins, tokens: np.ndarray, costs: np.ndarray, max_tokens: int, bound: float, close_enough: float
) -> np.ndarray:
    """[n] the bin of each sequence after exchanges between bins of one kind."""
    kinds = np.zeros(math.prod(start.shape), dtype=np.int64)
    search = Search(start.home, tokens[None], costs[None], start.shape, kinds + max_tokens, kinds)
    return search.run(bound, close_enough=close_enough)


@dataclass(frozen=True, slots=True)
class _Bins:
    """Sequences in bins."""

    home: np.ndarray
    """[n] bin of each sequence."""
    loads: np.ndarray
    """[E, K, R] int64 cost of each bin."""

    @classmethod
    def of(cls, home: np.ndarray, costs: np.ndarray, shape: tuple[int, int, int]) -> _Bins:
        """Add up the costs of each bin, which float64 holds exactly."""
        return cls(home, np.bincount(home, costs, math.prod(shape)).astype(np.int64).reshape(shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, R)."""
        groups, slots, ranks = self.loads.shape
        return groups, slots, ranks

    def price(self, fewest: int, bubble_slots: float) -> float:
        """The slowest group's time, its pipeline's bubble and the price of slots beyond the fewest included."""
        times = self.loads.max(axis=2)
        slowest = float((times.sum(axis=1) + bubble_slots * times.max(axis=1)).max())
        return slowest * (1 + SLOT_PRICE * (self.shape[1] - fewest))


def _starts(
    tokens: np.ndarray, costs: np.ndarray, shape: tuple[int, int], max_tokens: int, slot_multiple: int
) -> list[_Bins]:
    """Bins for each number of slots that is tried, as they are built or regrouped, whichever is faster."""
    groups, ranks = shape
    slots = round_up(-(-fewest_bins(tokens, max_tokens) // (groups * ranks)), slot_multiple)
    while (home := BinBuilder(tokens, costs, (groups, slots, ranks), max_tokens).build()) is None:
        slots += slot_multiple
    starts = []
    for count in sorted({round_up(slots + extra, slot_multiple) for extra in EXTRA_SLOTS}):
        full_shape = (groups, count, ranks)
        if count > slots:
            home = BinBuilder(tokens, costs, full_shape, max_tokens).build()
        if home is not None:
            built = _Bins.of(home, costs, full_shape)
            regrouped = _Bins.of(regroup(built.loads.reshape(-1), full_shape)[home], costs, full_shape)
            starts.append(min(built, regrouped, key=lambda bins: bins.price(count, 0.0)))
    return starts


def _read_out(home: np.ndarray, loads: np.ndarray) -> list[list[list[int]]]:
    """Lists by slot and rank; the longest slots first, so that slots of like cost meet across expert groups."""
    groups, slots, ranks = loads.shape
    times = loads.max(axis=2)
    result: list[list[list[int]]] = [[[] for _ in range(groups * ranks)] for _ in range(slots)]
    place = np.argsort(np.argsort(-times, axis=1, kind="stable"), axis=1, kind="stable")
    for index, target in enumerate(home.tolist()):
        slot_flat, rank = divmod(target, ranks)
        group, slot = divmod(slot_flat, slots)
        result[int(place[group, slot])][group * ranks + rank].append(index)
    return result
