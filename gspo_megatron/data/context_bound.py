"""A proved lower bound on the time of packs that 1, 2, 4, ... context-parallel ranks share.

Take the packs of one row in a slot, of k_1, k_2, ... ranks, C together. The slot takes at least as long as each
of them, so as long as their mean with weights k_j / C. In that mean a sequence has the part k * time(i, k) / C,
which is at least c_i, the least over the k whose ranks have room for it. And all tokens of the row fit in C ranks. So
a row in a slot is a bin of `balance_bound` with costs c_i, whatever packs it holds, and a slot that holds sequence i
takes at least a_i, the least of time(i, k): `lower_bound` with `alone`. Packs of a slot may be of different sizes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gspo_megatron.data.balance import WHOLE
from gspo_megatron.data.balance_bound import fewest_bins, lower_bound
from gspo_megatron.parallel import Layout, round_up

SharedCost = Callable[[int, int], float]
"""(tokens of a sequence, ranks that share it) -> time of each rank; times in one pack add up."""


def least_time(
    lengths: Sequence[int],
    cost: SharedCost,
    layout: Layout,
    max_tokens: int,
    slot_cost: float = 0.0,
    rows_per_expert_group: int = 1,
) -> float:
    """What no packing beats: the time of the slowest expert group and of its slots.

    Args: those of `context_packing.pack_shared`; where times in one pack add up to less, `cost` is that less.
    """
    rows, room = rows_per_expert_group, max_tokens // layout.context
    tokens, costs, scale = measure(lengths, cost, layout)
    bound = shared_bound(tokens, costs, layout, rows, room) / scale
    return bound + slot_cost * -(-fewest_bins(tokens.min(axis=0), room * layout.context) // layout.data)


def measure(lengths: Sequence[int], cost: SharedCost, layout: Layout) -> tuple[np.ndarray, np.ndarray, float]:
    """[kinds, n] padded tokens, [kinds, n] times as whole numbers, and how many of their unit a time of 1 is."""
    sizes = layout.context_sizes
    tokens = np.array([[round_up(length, layout.padding_of(size)) for length in lengths] for size in sizes])
    times = np.array([[cost(length, size) for length in lengths] for size in sizes])
    scale = WHOLE / (float(times[0].sum()) or 1.0)
    return tokens, np.maximum(np.rint(times * scale).astype(np.int64), 1), scale


def shared_bound(tokens: np.ndarray, costs: np.ndarray, layout: Layout, rows: int, room: int) -> float:
    """The bound without what slots cost.

    Args:
        tokens: [kinds, n] of each sequence, by the ranks that share it.
        costs: [kinds, n] int64 times.
        layout: of the policy.
        rows: of an expert group.
        room: most tokens of a rank in a slot.
    """
    sizes = np.array(layout.context_sizes)[:, None]
    never = np.iinfo(np.int64).max // layout.context
    fitting = np.where(tokens <= room * sizes, costs, never)
    parts = (np.where(fitting < never, fitting * sizes, never).min(axis=0)) // layout.context
    return lower_bound(tokens.min(axis=0), parts, layout.data // rows, rows, room * layout.context, fitting.min(axis=0))
