"""A proved lower bound on the time of the slowest expert group: what no packing can beat.

Legend: n sequences, E expert groups, R ranks of a group, C most tokens of a bin, c_i cost and L_i tokens of
sequence i, c_1 >= c_2 >= ... A slot takes as long as its most expensive bin, a group as long as its slots together.
"""

from __future__ import annotations

import numpy as np

MOST_SLOTS = 8
"""Largest k of the fourth bound; later slots are short, and ranks wait little in them."""
MOST_PRICES = 64
"""Prices of a token that are tried; each gives a valid bound, more of them a slightly higher one."""


def lower_bound(
    tokens: np.ndarray,
    costs: np.ndarray,
    num_groups: int,
    ranks: int,
    max_tokens: int,
    alone: np.ndarray | None = None,
) -> float:
    """The largest of four lower bounds on the time of the slowest expert group, for any number of slots.

    1. *Mean.* All costs over all ranks.
    2. *Longest sequence.* It cannot be cut, so its slot takes c_1.
    3. *Pigeonhole.* Of the first E * R * m + 1 sequences, m + 1 meet on one rank. The slots of its group take at
       least the sum of their costs, and the m + 1 cheapest of these sequences cost the least.
    4. *Waste.* Let no two of the first R * (k - 1) + 1 sequences fit in one bin. Let slot A_1 hold sequence 1. For
       s = 2..k, slots A_1 to A_(s-1) hold at most R * (s - 1) of these sequences, so another slot A_s holds one of
       the first R * (s - 1) + 1 and takes t_s >= tau_s = c_(R*(s-1)+1); tau_1 = c_1. Time that a rank waits in
       these slots is lost: with the sums over all groups and the bins B of A_1 to A_k,

           R * (sum of all slot times) >= sum_i c_i + sum_B (t_s(B) - cost(B))
                                       >= sum_i c_i + R * sum_s tau_s - sum_B min(cost(B), tau_s(B))

       because t_s >= tau_s and t_s >= cost(B). The bin of sequence 1 adds at most c_1 to the last sum, and the other
       k * R - 1 bins at most `most_content`, for tau_s <= c_1. The slowest group takes at least 1 / E of the sum.

    With `alone` a slot that holds sequence i takes at least a_i >= c_i, which is more than its part of a bin. Then
    a takes the place of c in 2, in every tau_s and in what limits the content of a bin; and in 3 where no two of these
    sequences fit in one bin, for they are in m + 1 slots.

    Args:
        tokens: [n] int64, none above `max_tokens`, n >= 1.
        costs: [n] int64. Whole numbers keep the result equal on every machine.
        num_groups: E.
        ranks: R.
        max_tokens: C.
        alone: [n] int64, a; None = `costs`.

    Returns:
        The bound in the unit of `costs`.
    """
    times = costs if alone is None else alone
    order = np.lexsort((-tokens, -times))
    tokens, costs, times = tokens[order], costs[order], times[order]
    bins, total = num_groups * ranks, int(costs.sum())
    bound = max(total / bins, float(times[0]), _pigeonhole(np.sort(costs)[::-1], bins))
    # How many of the first sequences there are of which no two fit in one bin.
    apart = _apart(tokens, max_tokens)
    bound = max(bound, _pigeonhole(times[:apart], bins))
    known = 0
    # A rank without others in its group never waits; where sequences take longer than their part, it does.
    for slots in range(1, MOST_SLOTS + 1 if ranks > 1 or alone is not None else 1):
        last = (slots - 1) * ranks
        if last >= apart:
            break
        known += int(times[last])
        content = int(times[0]) + most_content(tokens[1:], costs[1:], slots * ranks - 1, max_tokens, int(times[0]))
        if alone is not None:
            content = min(content, most_content(tokens, costs, slots * ranks, max_tokens, int(times[0])))
        bound = max(bound, (known + (total - content) / ranks) / num_groups)
    return bound


def fewest_bins(tokens: np.ndarray, max_tokens: int) -> int:
    """A lower bound on the bins that [n] sequences need: two above half of the limit never share one."""
    return max(-(-int(tokens.sum()) // max_tokens), int((2 * tokens > max_tokens).sum()))


def _apart(tokens: np.ndarray, max_tokens: int) -> int:
    """The most first sequences of which no two fit in one bin; 1 at least."""
    shortest = int(tokens[0])
    for count, size in enumerate(tokens.tolist()[1:], start=1):
        if shortest + size <= max_tokens:
            return count
        shortest = min(shortest, size)
    return len(tokens)


def _pigeonhole(costs: np.ndarray, bins: int) -> float:
    """Bound 3: the m + 1 cheapest of the first bins * m + 1 sequences, falling, for the best m."""
    together = range(1, (len(costs) - 1) // bins + 1)
    return float(max((costs[bins * m - m : bins * m + 1].sum() for m in together), default=0))


def most_content(tokens: np.ndarray, costs: np.ndarray, count: int, max_tokens: int, limit: int) -> int:
    """An upper bound on sum_B min(cost(B), limit) over `count` disjoint bins B of at most C tokens.

    Call a bin's longest sequence its head h and the others its fillers. A filler j has L_j <= C / 2 and
    L_j <= C - L_h, so its cost a token is at most d_h, the most among sequences of at most C - L_h tokens. For a
    price p >= 0 of a token let x_j = max(0, c_j - p * L_j) where L_j <= C / 2, and 0 elsewhere. Then a filler costs
    c_j <= x_j + min(p, d_h) * L_j, fillers have at most C - L_h tokens together, and

        min(cost(B), limit) <= min(limit, c_h + (C - L_h) * min(p, d_h)) + sum of x_j over the fillers.

    Heads differ and no sequence is used twice. So the sum over bins is at most the sum of all x_j, and beside it the
    `count` largest values of min(limit, c_h + (C - L_h) * min(p, d_h)) - x_h. This holds for every p; the least is
    returned. Products are rounded up to whole numbers, so sums are exact.

    Args:
        tokens: [n] int64.
        costs: [n] int64, none above `limit`.
        count: Bins.
        max_tokens: C.
        limit: Most that counts of a bin's cost.
    """
    if not count or not len(costs):
        return 0
    density = costs / tokens
    room = max_tokens - tokens
    by_length = np.argsort(tokens, kind="stable")
    densest = np.concatenate([[0.0], np.maximum.accumulate(density[by_length])])
    joining = densest[np.searchsorted(tokens[by_length], room, side="right")]

    prices = np.concatenate([[0.0], np.sort(density)[:: -(-len(density) // MOST_PRICES)]])[:, None]
    over = np.where(2 * tokens <= max_tokens, np.ceil(np.maximum(costs - prices * tokens, 0.0)), 0.0).astype(np.int64)
    filled = np.minimum(limit, costs + np.ceil(room * np.minimum(prices, joining)).astype(np.int64))
    largest = np.sort(filled - over, axis=1)[:, -count:]
    return int((over.sum(axis=1) + np.maximum(largest, 0).sum(axis=1)).min())
