"""The local search of `balance`: moves and swaps of sequences between bins, many tried at once.

Legend as in `balance`: n sequences, E expert groups, K slots, R ranks, B = E*K*R bins, flat as (group, slot, rank);
M trials of a round. Bins may be of several kinds, in which a sequence costs and takes different amounts. Everything is
a whole number or one rounding of a product, so every machine finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDS = 120
"""Limit of the search, so that its time is bounded and the result does not depend on the machine."""
TRIALS = 300
"""M: moves and swaps that are tried in a round."""
NEAR = 10
"""Half of the swaps are tried with one of so many neighbours in the order of costs: they change loads the least."""
CANDIDATES = 64
"""The most promising trials of a round; those that gain after the ones made before them are made."""
TOLERANCE = 2e-4
"""A round accepts losses up to this share of the time, falling to 0 in the last round, to leave local optima."""
CLOSE_ENOUGH = 1e-4
"""The search ends within this share of the lower bound, unless the caller says what is not worth a search."""


@dataclass(frozen=True, slots=True)
class _Trials:
    """Sequence `give` goes to bin `target`, sequence `take` comes back; a `take` of n + b is bin b's free place."""

    give: np.ndarray
    """[M]."""
    take: np.ndarray
    """[M]."""
    source: np.ndarray
    """[M] bin of `give`."""
    target: np.ndarray
    """[M] bin of `take`."""
    saved: np.ndarray
    """[M] cost that the source loses."""
    added: np.ndarray
    """[M] cost that the target gets: of another kind of bin, where a sequence costs something else."""
    freed: np.ndarray
    """[M] tokens that the source loses."""
    filled: np.ndarray
    """[M] tokens that the target gets."""


class Search:
    """Bins under exchanges. Minimises the slowest group's time first, the mean of the groups' times beside it."""

    def __init__(
        self,
        home: np.ndarray,
        tokens: np.ndarray,
        costs: np.ndarray,
        shape: tuple[int, int, int],
        rooms: np.ndarray,
        kinds: np.ndarray,
    ) -> None:
        """Take bins.

        Args:
            home: [n] bin of each sequence.
            tokens: [kinds, n] int64, what a sequence takes in a bin of each kind.
            costs: [kinds, n] int64, falling.
            shape: (E, K, R).
            rooms: [B] most tokens of each bin.
            kinds: [B] of each bin.
        """
        self.shape, self.rooms, self.kinds, self.count = shape, rooms, kinds, len(home)
        bins = shape[0] * shape[1] * shape[2]
        none, free = np.zeros(bins, dtype=np.int64), np.zeros((len(tokens), bins), dtype=np.int64)
        # Free places are sequences of no tokens, so that a move is a swap with one.
        self.home = np.concatenate([home, np.arange(bins)])
        self.tokens, self.costs = np.concatenate([tokens, free], axis=1), np.concatenate([costs, free], axis=1)
        self.loads, self.filled = none.copy(), none.copy()
        every = np.arange(len(home))
        np.add.at(self.loads, home, costs[kinds[home], every])
        np.add.at(self.filled, home, tokens[kinds[home], every])
        self.slot_of = np.arange(bins) // shape[2]

    def run(self, bound: float, rounds: int = ROUNDS, close_enough: float = CLOSE_ENOUGH) -> np.ndarray:
        """[n] the best bins seen in so many rounds; ends when the slowest group is within this share of `bound`."""
        generator = np.random.default_rng(0)
        best, best_home = None, self.home[: self.count].copy()
        for turn in range(rounds):
            ordered, places = self._sorted_slots()
            times = ordered[:, 0].reshape(self.shape[:2]).sum(axis=1)
            slowest = int(times.max())
            if best is None or slowest < best:
                best, best_home = slowest, self.home[: self.count].copy()
            if best <= bound * (1 + close_enough):
                break
            trials = self._draw(generator, int(times.argmax()))
            changes = self._changes(trials, ordered, places)
            worth = generator.random(len(trials.give)) * (TOLERANCE * slowest * (1 - (turn + 1) / rounds))
            self._apply(trials, *changes, times, worth)
        return best_home

    def _sorted_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """[E*K, max(R, 3)] the loads of each slot, falling, filled up with 0; and [B] each bin's place in its slot."""
        ranks = self.shape[2]
        table = self.loads.reshape(-1, ranks)
        order = np.argsort(-table, axis=1, kind="stable")
        ordered = np.take_along_axis(table, order, axis=1)
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.arange(ranks)[None, :], axis=1)
        if ranks < 3:
            ordered = np.concatenate([ordered, np.zeros((len(ordered), 3 - ranks), dtype=np.int64)], axis=1)
        return ordered, places.reshape(-1)

    def _draw(self, generator: np.random.Generator, slowest: int) -> _Trials:
        """Random trials that keep to the token limit; half of them give from the slowest group."""
        count, half = self.count, TRIALS // 2
        groups, slots, ranks = self.shape
        give = generator.integers(0, count, TRIALS)
        if groups > 1:
            members = np.flatnonzero(self.home[:count] // (slots * ranks) == slowest)
            give[:half] = members[generator.integers(0, len(members), half)]
        take = generator.integers(0, len(self.home), TRIALS)
        near = np.clip(give + generator.integers(-NEAR, NEAR + 1, TRIALS), 0, count - 1)
        take = np.where(generator.random(TRIALS) < 0.5, near, take)

        source, target = self.home[give], self.home[take]
        out, into = self.kinds[source], self.kinds[target]
        freed = self.tokens[out, give] - self.tokens[out, take]
        filled = self.tokens[into, give] - self.tokens[into, take]
        fits = (self.filled[target] + filled <= self.rooms[target]) & (
            self.filled[source] - freed <= self.rooms[source]
        )
        kept = np.flatnonzero(fits & (source != target))
        give, take, out, into = give[kept], take[kept], out[kept], into[kept]
        saved = self.costs[out, give] - self.costs[out, take]
        added = self.costs[into, give] - self.costs[into, take]
        return _Trials(give, take, source[kept], target[kept], saved, added, freed[kept], filled[kept])

    def _changes(self, trials: _Trials, ordered: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[M] by how much the slot of the source, and that of the target, get slower; 0 for one slot's second."""
        here, there = self.slot_of[trials.source], self.slot_of[trials.target]
        place, other = places[trials.source], places[trials.target]
        less, more = self.loads[trials.source] - trials.saved, self.loads[trials.target] + trials.added
        # The most expensive bin of the slot that takes no part.
        rest_here = np.where(place == 0, ordered[here, 1], ordered[here, 0])
        rest_there = np.where(other == 0, ordered[there, 1], ordered[there, 0])
        first, second = np.minimum(place, other), np.maximum(place, other)
        third = np.where(second > 1, ordered[here, 1], ordered[here, 2])
        rest_both = np.where(first > 0, ordered[here, 0], third)

        same = here == there
        after = np.where(same, np.maximum(np.maximum(less, more), rest_both), np.maximum(less, rest_here))
        beside = np.where(same, 0, np.maximum(more, rest_there) - ordered[there, 0])
        return after - ordered[here, 0], beside

    def _slower(self, trials: _Trials, here: np.ndarray, there: np.ndarray, times: np.ndarray) -> np.ndarray:
        """[M] the change of 3 * E * (slowest group's time) + (sum of the groups' times), were a trial the only one."""
        groups, slots, _ = self.shape
        giver, taker = self.slot_of[trials.source] // slots, self.slot_of[trials.target] // slots
        both = giver == taker
        giver_after = times[giver] + here + np.where(both, there, 0)
        taker_after = np.where(both, giver_after, times[taker] + there)
        # The slowest group that takes no part is among the three slowest.
        first, second, third = [*np.argsort(-times, kind="stable"), -1, -1][:3]
        untouched = np.where(
            (giver != first) & (taker != first),
            times[first],
            np.where((giver != second) & (taker != second), times[second] * (second >= 0), times[third] * (third >= 0)),
        )
        slowest = np.maximum(np.maximum(giver_after, taker_after), untouched)
        return 3 * groups * (slowest - times.max()) + here + there

    def _apply(
        self, trials: _Trials, here: np.ndarray, there: np.ndarray, times: np.ndarray, worth: np.ndarray
    ) -> None:
        """Make the exchanges that gain, the best first, each slot at most once, so that the changes add up."""
        groups, slots, _ = self.shape
        promise = self._slower(trials, here, there, times) - 3 * groups * worth
        candidates = np.argsort(promise, kind="stable")[:CANDIDATES]
        now, used, chosen = times.tolist(), set(), []
        value = 3 * groups * max(now) + sum(now)
        columns = (self.slot_of[trials.source], self.slot_of[trials.target], here, there, worth)
        for index, *row in zip(candidates.tolist(), *(column[candidates].tolist() for column in columns), strict=True):
            source, target, change, beside, allowed = row
            if source in used or target in used:
                continue
            now[source // slots] += change
            now[target // slots] += beside
            after = 3 * groups * max(now) + sum(now)
            if after - value < 3 * groups * allowed:
                used |= {source, target}
                chosen.append(index)
                value = after
            else:
                now[source // slots] -= change
                now[target // slots] -= beside
        picked = np.array(chosen, dtype=np.int64)
        source, target = trials.source[picked], trials.target[picked]
        give, take = trials.give[picked], trials.take[picked]
        self.loads[source] -= trials.saved[picked]
        self.loads[target] += trials.added[picked]
        self.filled[source] -= trials.freed[picked]
        self.filled[target] += trials.filled[picked]
        self.home[give] = target
        swapped = take < self.count
        self.home[take[swapped]] = source[swapped]
