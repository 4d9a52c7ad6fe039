"""The first bins of `balance`: slots filled up to their longest sequence, then an even spread of the rest.

Legend as in `balance`: E expert groups, K slots, R ranks; a bin is (group, slot, rank), flat in that order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class BinBuilder:
    """Places sequences into E * K * R bins.

    Where the longest sequence left takes longer than an even share of the rest, its slot takes as long as it does,
    and the other ranks of the slot wait. So they are filled up to its cost, with the longest sequences that fit: long
    ones cost most a token, and tokens are what such a bin runs out of. What is left is short and is spread evenly.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        costs: np.ndarray,
        shape: tuple[int, int, int],
        max_tokens: int,
        times: Sequence[int] = (),
    ) -> None:
        """Take sequences, costs falling.

        Args:
            tokens: [n] int64.
            costs: [n] int64, falling.
            shape: (E, K, R).
            max_tokens: Most tokens of a bin.
            times: [E] time of other slots of each group; empty = none.
        """
        self.tokens, self.costs, self.shape, self.max_tokens = tokens.tolist(), costs.tolist(), shape, max_tokens
        self.home = [-1] * len(costs)
        """[n] bin of each sequence, -1 before it has one."""
        self.rest = sum(self.costs)
        """Cost of the sequences without a bin."""
        self.times = list(times) or [0] * shape[0]
        """[E] time of the closed slots of each group."""
        self.closed = [0] * shape[0]
        """[E] number of them."""
        self._next = list(range(len(costs) + 1))
        # Falling values as rising ones, so that a bisection finds the first sequence within a limit.
        self._by_tokens = [-value for value in self.tokens]
        self._by_costs = [-value for value in self.costs]
        self._ordered = bool((np.diff(tokens) <= 0).all())

    def build(self) -> np.ndarray | None:
        """[n] bin of each sequence, or None where one fits in no bin."""
        groups, slots, _ = self.shape
        while (head := self._first_from(0)) < len(self.home) and self._ordered:
            level = self._level()
            open_groups = [group for group in range(groups) if self.closed[group] < slots]
            if not open_groups:
                return None
            share = max((level - self.times[group]) / (slots - self.closed[group]) for group in open_groups)
            if self.costs[head] <= share:
                break
            self._fill_slot(min(open_groups, key=lambda group: (self.times[group], group)), self.costs[head])
        return self._spread()

    def fill_for(self, count: int) -> np.ndarray:
        """[n] bin of each sequence, or -1, once slots are filled up to their longest for each of the first `count`."""
        while (head := self._first_from(0)) < count:
            self._fill_slot(min(range(self.shape[0]), key=lambda group: (self.times[group], group)), self.costs[head])
        return np.array(self.home)

    def _first_from(self, index: int) -> int:
        """The first sequence without a bin from `index` on, n if there is none; paths are halved on the way."""
        following = self._next
        while following[index] != index:
            following[index] = following[following[index]]
            index = following[index]
        return index

    def _level(self) -> float:
        """The time of the slowest group after an even spread of the rest, were sequences as fine as sand."""
        ranks, times, filled, level = self.shape[2], sorted(self.times), 0, 0.0
        for count, time in enumerate(times, start=1):
            filled += time
            level = (filled * ranks + self.rest) / (count * ranks)
            if count == len(times) or level <= times[count]:
                break
        return level

    def _fill_slot(self, group: int, limit: int) -> None:
        """Close the next slot of a group: fill each of its bins up to `limit`, the longest that fits first."""
        _, slots, ranks = self.shape
        first = (group * slots + self.closed[group]) * ranks
        for target in range(first, first + ranks):
            gap, room = limit, self.max_tokens
            while gap > 0 and room > 0:
                fitting = max(bisect_left(self._by_tokens, -room), bisect_left(self._by_costs, -gap))
                index = self._first_from(fitting)
                if index == len(self.home):
                    break
                self.home[index] = target
                self._next[index] = index + 1
                gap -= self.costs[index]
                room -= self.tokens[index]
            self.rest -= limit - gap
        self.times[group] += limit
        self.closed[group] += 1

    def _spread(self) -> np.ndarray | None:
        """Put the rest into the bins of the open slots: each where most is missing to an even share."""
        _, slots, ranks = self.shape
        closed = np.array(self.closed)
        # An even share of what is missing to the level, the same in all open slots of a group.
        missing = np.maximum(self._level() - np.array(self.times), 0.0) / np.maximum(slots - closed, 1)
        gaps = np.repeat(np.where(np.arange(slots) < closed[:, None], -np.inf, missing[:, None]).reshape(-1), ranks)
        room = np.where(gaps == -np.inf, -1, self.max_tokens)
        for index in (index for index, target in enumerate(self.home) if target < 0):
            fitting = np.where(room >= self.tokens[index], gaps, -np.inf)
            target = int(fitting.argmax())
            if fitting[target] == -np.inf:
                return None
            gaps[target] -= self.costs[index]
            room[target] -= self.tokens[index]
            self.home[index] = target
        return np.array(self.home)


def regroup(loads: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A new place for each bin: bins of like load share a slot, and slots are spread over groups.

    For one group no other pairing of the same bins is faster: the k-th longest slot takes at least as long as the
    bin of rank R * (k - 1) + 1.

    Args:
        loads: [E*K*R] int64, cost of each bin.
        shape: (E, K, R).

    Returns:
        [E*K*R] the bin that each bin becomes.
    """
    groups, slots, ranks = shape
    order = np.argsort(-loads, kind="stable").reshape(groups * slots, ranks)
    place = np.empty(len(loads), dtype=np.int64)
    times, used = [0] * groups, [0] * groups
    for members in order:
        group = min((g for g in range(groups) if used[g] < slots), key=lambda g: (times[g], g))
        first = (group * slots + used[group]) * ranks
        place[members] = np.arange(first, first + ranks)
        times[group] += int(loads[members[0]])
        used[group] += 1
    return place
