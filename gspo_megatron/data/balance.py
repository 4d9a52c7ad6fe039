"""The bin assignment behind `pack`: a greedy start, then moves and swaps while the slowest expert group gets faster.

Legend: K slots, R ranks of an expert group, E expert groups, B = E*K*R bins; a bin is (group, slot, rank), flat in
that order, and slots are flat as (group, slot). The time of a slot is the largest cost of its bins, the time of a group
is the sum over its slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_EXCHANGES = 400
"""Limit of the improvement, so that the time is bounded and the result does not depend on the machine."""
LEAST_GAIN = 3e-5
"""Smallest improvement worth an exchange, as a share of the time."""


@dataclass(slots=True)
class _Bins:
    """Bins being filled."""

    shape: tuple[int, int, int]
    """(E, K, R)."""
    tokens: np.ndarray
    """[B] tokens of each bin."""
    loads: np.ndarray
    """[B] cost of each bin."""
    home: np.ndarray
    """[n] bin of each sequence, -1 before it has one."""

    def slot_times(self) -> np.ndarray:
        """[E*K]: the largest cost of a bin in each slot."""
        return self.loads.reshape(-1, self.shape[2]).max(axis=1)

    def group_times(self) -> np.ndarray:
        """[E]: the sum over the slots of each group."""
        return self.slot_times().reshape(self.shape[0], -1).sum(axis=1)


def balance(
    tokens: np.ndarray, costs: np.ndarray, num_groups: int, ranks: int, max_tokens: int
) -> list[list[list[int]]]:
    """[slot][rank] -> sequence indices, with the fewest slots into which the greedy start fits.

    Args:
        tokens: [n] tokens of each sequence, none above `max_tokens`.
        costs: [n] cost of each sequence.
        num_groups: E.
        ranks: R.
        max_tokens: Most tokens of a bin.
    """
    order = np.lexsort((np.arange(len(costs)), -tokens, -costs))
    slots = -(-int(tokens.sum()) // (num_groups * ranks * max_tokens))
    while (bins := _fill(order, tokens, costs, (num_groups, slots, ranks), max_tokens)) is None:
        slots += 1
    _improve(bins, tokens, costs, max_tokens)
    return _read_out(bins)


def _fill(
    order: np.ndarray, tokens: np.ndarray, costs: np.ndarray, shape: tuple[int, int, int], max_tokens: int
) -> _Bins | None:
    """Put each sequence, most costly first, into the bin where its group stays fastest; None if one fits nowhere."""
    groups, slots, ranks = shape
    count = groups * slots * ranks
    bins = _Bins(shape, np.zeros(count, dtype=np.int64), np.zeros(count), np.full(len(costs), -1))
    slot_times, group_times = np.zeros(groups * slots), np.zeros(groups)
    slot_of = np.arange(count) // ranks
    group_of = slot_of // slots
    for index in order:
        grown = np.maximum(bins.loads + costs[index] - slot_times[slot_of], 0.0)
        after = np.where(bins.tokens + tokens[index] <= max_tokens, group_times[group_of] + grown, np.inf)
        best = after.min()
        if best == np.inf:
            return None
        # Among equals the fullest bin, which leaves the wide gaps for long sequences.
        chosen = int(np.where(after <= best * (1 + 1e-12), bins.loads, -1.0).argmax())
        bins.home[index] = chosen
        bins.tokens[chosen] += tokens[index]
        bins.loads[chosen] += costs[index]
        slot_times[slot_of[chosen]] += grown[chosen]
        group_times[group_of[chosen]] += grown[chosen]
    return bins


def _improve(bins: _Bins, tokens: np.ndarray, costs: np.ndarray, max_tokens: int) -> None:
    """Exchange sequences of the most costly bins of the slowest group with other bins until no exchange helps."""
    groups, slots, ranks = bins.shape
    for _ in range(MOST_EXCHANGES):
        times = bins.group_times()
        slowest = int(times.argmax())
        loads = bins.loads.reshape(groups, slots, ranks)[slowest]
        waste = loads.max(axis=1) - loads.mean(axis=1)
        for slot in np.argsort(-waste, kind="stable"):
            if loads[slot].max() == 0.0:
                continue
            source = (slowest * slots + int(slot)) * ranks + int(loads[slot].argmax())
            gain, give, take, target = _best_exchange(bins, source, times, tokens, costs, max_tokens)
            if gain > LEAST_GAIN * times[slowest]:
                _exchange(bins, give, take, target, tokens, costs)
                break
        else:
            return


def _best_exchange(
    bins: _Bins, source: int, times: np.ndarray, tokens: np.ndarray, costs: np.ndarray, max_tokens: int
) -> tuple[float, int, int | None, int]:
    """The best exchange for one sequence of a bin: (gain, the sequence, the one taken for it or None, its bin)."""
    _, slots, ranks = bins.shape
    given = np.flatnonzero(bins.home == source)
    others = np.flatnonzero(bins.home != source)
    # Every exchange partner: each sequence elsewhere, and each bin's empty place, which costs nothing.
    targets = np.concatenate([bins.home[others], np.arange(len(bins.loads))])
    taken_costs = np.concatenate([costs[others], np.zeros(len(bins.loads))])
    taken_tokens = np.concatenate([tokens[others], np.zeros(len(bins.loads), dtype=np.int64)])
    shift = costs[given][:, None] - taken_costs[None, :]
    moved = tokens[given][:, None] - taken_tokens[None, :]
    fits = (bins.tokens[targets][None, :] + moved <= max_tokens) & (bins.tokens[source] - moved <= max_tokens)
    fits &= (targets != source)[None, :]

    slot_of = np.arange(len(bins.loads)) // ranks
    source_after = bins.loads[source] - shift
    target_after = bins.loads[targets][None, :] + shift
    slot_times = bins.slot_times()
    rest_target = _largest_of_the_others(bins, source)[targets][None, :]
    rest_source = np.delete(bins.loads.reshape(-1, ranks)[slot_of[source]], source % ranks).max(initial=0.0)
    same_slot = (slot_of[targets] == slot_of[source])[None, :]
    both = np.maximum(np.maximum(source_after, target_after), rest_target) - slot_times[slot_of[source]]
    source_change = np.maximum(source_after, rest_source) - slot_times[slot_of[source]]
    target_change = np.maximum(target_after, rest_target) - slot_times[slot_of[targets]][None, :]

    source_group, target_groups = slot_of[source] // slots, slot_of[targets] // slots
    within = np.where(same_slot, both, source_change + target_change)
    across = (
        np.maximum(times[source_group] + source_change, times[target_groups][None, :] + target_change)
        - times[source_group]
    )
    change = np.where((target_groups == source_group)[None, :], within, across)
    change = np.where(fits, change, np.inf)
    row, column = divmod(int(change.argmin()), change.shape[1])
    partner = int(others[column]) if column < len(others) else None
    return -float(change[row, column]), int(given[row]), partner, int(targets[column])


def _largest_of_the_others(bins: _Bins, source: int) -> np.ndarray:
    """[B]: the largest cost among the other bins of each bin's slot, without `source`."""
    ranks = bins.shape[2]
    loads = bins.loads.copy()
    loads[source] = 0.0
    table = loads.reshape(-1, ranks)
    if ranks == 1:
        return np.zeros(len(loads))
    ordered = np.sort(table, axis=1)
    first, second = ordered[:, -1:], ordered[:, -2:-1]
    most_costly = table.argmax(axis=1)[:, None] == np.arange(ranks)[None, :]
    return np.where(most_costly, second, first).reshape(-1)


def _exchange(bins: _Bins, give: int, take: int | None, target: int, tokens: np.ndarray, costs: np.ndarray) -> None:
    source = int(bins.home[give])
    for index, origin, goal in ((give, source, target), (take, target, source)):
        if index is not None:
            bins.home[index] = goal
            bins.tokens[origin] -= tokens[index]
            bins.tokens[goal] += tokens[index]
            bins.loads[origin] -= costs[index]
            bins.loads[goal] += costs[index]


def _read_out(bins: _Bins) -> list[list[list[int]]]:
    """Lists by slot and rank; the most costly slots first, so that slots of like cost meet across expert groups."""
    groups, slots, ranks = bins.shape
    times = bins.slot_times().reshape(groups, slots)
    result: list[list[list[int]]] = [[[] for _ in range(groups * ranks)] for _ in range(slots)]
    place = np.argsort(np.argsort(-times, axis=1, kind="stable"), axis=1, kind="stable")
    for index, home in enumerate(bins.home):
        slot_flat, rank = divmod(int(home), ranks)
        group, slot = divmod(slot_flat, slots)
        result[int(place[group, slot])][group * ranks + rank].append(index)
    return result
