"""Packing as other frameworks publish it, written anew from their descriptions, for `bench_packing.py`.

Each packer takes lengths, ranks and the token limit and returns [rank][slot] -> indices. None takes the expert group
into account, and only those that fill bins first keep to the token limit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

Bins = list[list[int]]
Cost = Callable[[int], float]
Peer = Callable[[Sequence[int], Cost, int, int], list[Bins]]


def karmarkar_karp(costs: Sequence[float], count: int, equal_size: bool = False) -> Bins:
    """Largest differencing: join the two partitions of largest spread, the largest set of one to the smallest.

    Args:
        costs: Cost of each item.
        count: Sets.
        equal_size: Each set has as many items as the others, up to one.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    step = count if equal_size else 1
    heap = []
    for turn, start in enumerate(range(0, len(order), step)):
        members = order[start : start + step]
        sets = [(costs[index], [index]) for index in reversed(members)]
        sets += [(0.0, []) for _ in range(count - len(sets))]
        heap.append((sets[-1][0] - sets[0][0], turn, sets))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, turn, left = heapq.heappop(heap)
        _, _, right = heapq.heappop(heap)
        joined = [(a + b, one + two) for (a, one), (b, two) in zip(left, reversed(right), strict=True)]
        joined.sort(key=lambda entry: -entry[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], turn, joined))
    return [members for _, members in heap[0][2]]


def first_fit(lengths: Sequence[int], order: Sequence[int], max_tokens: int, bins: Bins | None = None) -> Bins:
    """Each sequence into the first bin that has room."""
    bins = bins if bins is not None else []
    room = [max_tokens - sum(lengths[index] for index in members) for members in bins]
    for index in order:
        place = next((place for place, free in enumerate(room) if free >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def in_order(lengths: Sequence[int], cost: Cost, num_ranks: int, max_tokens: int) -> list[Bins]:
    """Megatron-LM `dp_balanced`: original order, a bin ends where the next sequence does not fit; bins are dealt."""
    bins: Bins = [[]]
    for index, length in enumerate(lengths):
        if sum(lengths[member] for member in bins[-1]) + length > max_tokens:
            bins.append([])
        bins[-1].append(index)
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def verl(lengths: Sequence[int], cost: Cost, num_ranks: int, max_tokens: int) -> list[Bins]:
    """verl: Karmarkar-Karp on 24576 * s + s^2, equal counts over ranks, then again over a rank's micro-batches."""
    work = [24_576.0 * length + float(length) ** 2 for length in lengths]
    ranks = karmarkar_karp(work, num_ranks, equal_size=True)
    slots = max(-(-sum(lengths[index] for index in members) // max_tokens) for members in ranks)
    result = []
    for members in ranks:
        parts = karmarkar_karp([work[index] for index in members], slots)
        result.append([[members[index] for index in part] for part in parts])
    return result


def slime(lengths: Sequence[int], cost: Cost, num_ranks: int, max_tokens: int) -> list[Bins]:
    """Slime: first fit into bins by tokens, then Karmarkar-Karp of the bins' FLOPs over ranks, equal counts."""
    bins = first_fit(lengths, range(len(lengths)), max_tokens)
    work = [sum(cost(lengths[index]) for index in members) for members in bins]
    return [[bins[index] for index in part] for part in karmarkar_karp(work, num_ranks, equal_size=True)]


def nemo(lengths: Sequence[int], cost: Cost, num_ranks: int, max_tokens: int) -> list[Bins]:
    """NeMo-RL: modified first-fit decreasing (Johnson and Garey 1985) by tokens, bins dealt over ranks."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    large = [index for index in order if 2 * lengths[index] > max_tokens]
    medium = [index for index in order if lengths[index] * 3 > max_tokens >= 2 * lengths[index]]
    small = [index for index in order if lengths[index] * 6 > max_tokens >= 3 * lengths[index]]
    tiny = [index for index in order if lengths[index] * 6 <= max_tokens]
    bins = [[index] for index in large]

    def room(members: list[int]) -> int:
        return max_tokens - sum(lengths[member] for member in members)

    def take(pool: list[int], free: int) -> list[int]:
        found = next((index for index in pool if lengths[index] <= free), None)
        if found is None:
            return []
        pool.remove(found)
        return [found]

    for members in bins:
        members += take(medium, room(members))
    for members in reversed(bins):
        without_medium = len(members) == 1
        if without_medium and len(small) > 1 and lengths[small[-1]] + lengths[small[-2]] <= room(members):
            members.append(small.pop())
            members += take(small, room(members))
    rest = [*medium, *small, *tiny]
    for members in bins:
        while found := take(rest, room(members)):
            members += found
    bins = first_fit(lengths, rest, max_tokens, bins)
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


PEERS: dict[str, Peer] = {"Megatron-LM": in_order, "verl": verl, "slime": slime, "NeMo-RL": nemo}


def by_slot(ranks: list[Bins]) -> list[Bins]:
    """[rank][slot] -> [slot][rank], with empty bins where a rank has fewer."""
    slots = max(len(bins) for bins in ranks)
    return [[bins[slot] if slot < len(bins) else [] for bins in ranks] for slot in range(slots)]
