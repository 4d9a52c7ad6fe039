"""The arithmetic of a transfer plan on numpy rows: what must move, who of its holders sends it, in which round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gspo_megatron.models.hf_table import Parameter
from gspo_megatron.models.vllm_layout import ServerParameter

FLOW = np.dtype(
    [
        (name, np.int64)
        for name in (
            "tensor", "row", "column", "height", "width", "item",  # a rectangle of a tensor, and bytes of a value
            "sender", "source", "source_row", "source_column",  # rank, parameter and place there
            "receiver", "target", "target_expert", "target_row", "target_column",
            "round",
        )
    ]
)  # fmt: skip
"""One rectangle on its way. `tensor`, `source` and `target` are numbers of names."""


class Names:
    """Numbers for names, in the order of their first use."""

    def __init__(self) -> None:
        self.list: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a name."""
        if name not in self._numbers:
            self._numbers[name] = len(self.list)
            self.list.append(name)
        return self._numbers[name]


@dataclass(frozen=True, slots=True)
class Requirement:
    """What receivers need, before it is decided who sends it."""

    flows: np.ndarray
    """[n] rows of FLOW, without sender and round."""
    group: np.ndarray
    """[n] index into `groups`."""
    groups: list[tuple[int, ...]] = field(default_factory=list)
    """Senders that hold the same rectangle at the same place, any of which can send it."""

    def where(self, mask: np.ndarray) -> Requirement:
        """The part that a mask over the rows picks."""
        return Requirement(self.flows[mask], self.group[mask], self.groups)


def collect(
    held: Sequence[Sequence[Parameter]],
    wanted: Sequence[Sequence[ServerParameter]],
    names: Names,
    item_bytes: Callable[[str], int],
) -> Requirement:
    """Meet what each sender holds with what each receiver wants.

    Args:
        held: for each sender its parameters; two senders' rectangles of one tensor are equal or disjoint.
        wanted: for each receiver its parameters.
        names: gets the names of tensors and parameters.
        item_bytes: of a value of a tensor.
    """
    sources = _sources(held, names)
    rows: list[tuple[int, ...]] = []
    group: list[int] = []
    numbers: dict[tuple[int, ...], int] = {}
    for receiver, parameters in enumerate(wanted):
        for parameter in parameters:
            target = names.number(parameter.name)
            for piece in parameter.pieces:
                tensor, item = names.number(piece.tensor), item_bytes(piece.tensor)
                (top, bottom), (left, right) = piece.rows, piece.columns or (0, 1)
                expert, down, across = piece.at
                for (r0, r1, c0, c1), (source, at, holders) in sources[tensor].items():
                    row, end, column, edge = max(top, r0), min(bottom, r1), max(left, c0), min(right, c1)
                    if row >= end or column >= edge:
                        continue
                    rows.append(
                        (
                            tensor, row, column, end - row, edge - column, item,
                            -1, source, at + row - r0, column - c0,
                            receiver, target, expert, down + row - top, across + column - left, 0,
                        )
                    )  # fmt: skip
                    group.append(numbers.setdefault(tuple(holders), len(numbers)))
    return Requirement(np.array(rows, FLOW), np.array(group, np.int64), list(numbers))


def _sources(
    held: Sequence[Sequence[Parameter]], names: Names
) -> dict[int, dict[tuple[int, int, int, int], tuple[int, int, list[int]]]]:
    """For each tensor its rectangles: (parameter, first row in it, senders)."""
    sources: dict[int, dict[tuple[int, int, int, int], tuple[int, int, list[int]]]] = {}
    for sender, parameters in enumerate(held):
        for parameter in parameters:
            source = names.number(parameter.name)
            for piece in parameter.pieces:
                (top, bottom), (left, right) = piece.rows, piece.columns or (0, 1)
                rectangles = sources.setdefault(names.number(piece.tensor), {})
                rectangles.setdefault((top, bottom, left, right), (source, piece.at[0], []))[2].append(sender)
    return sources


def assign_senders(requirement: Requirement, loads: np.ndarray) -> np.ndarray:
    """Choose senders so that the busiest one has as little as possible; rows of FLOW.

    The demand on each group of equal holders is laid on a line and cut at their shares, at whole rows. Groups with the
    least choice come first; `loads` [senders], in bytes, is what senders have to send already and grows by this.
    """
    assigned = [requirement.flows[:0]]
    for number in sorted(set(requirement.group.tolist()), key=lambda number: len(requirement.groups[number])):
        holders = np.array(requirement.groups[number])
        flows = requirement.flows[requirement.group == number]
        # Neighbours on the line go to one receiver: fewer, larger messages.
        flows = flows[np.argsort(flows["receiver"], kind="stable")]
        widths = flows["width"] * flows["item"]
        edges = np.concatenate([[0], np.cumsum(flows["height"] * widths)])
        cuts = np.cumsum(fair_shares(loads[holders], edges[-1]))[:-1]
        index = np.clip(np.searchsorted(edges, cuts, "right") - 1, 0, len(flows) - 1)
        cuts = edges[index] + np.rint((cuts - edges[index]) / widths[index]).astype(np.int64) * widths[index]
        points = np.unique(np.concatenate([edges, cuts]))
        index = np.searchsorted(edges, points[:-1], "right") - 1
        parts = _cut(flows[index], (points[:-1] - edges[index]) // widths[index], np.diff(points) // widths[index])
        parts["sender"] = holders[np.searchsorted(cuts, points[:-1], "right")]
        np.add.at(loads, parts["sender"], bytes_of(parts))
        assigned.append(parts)
    return np.concatenate(assigned)


def bytes_of(flows: np.ndarray) -> np.ndarray:
    """[flows] bytes on the wire."""
    return flows["height"] * flows["width"] * flows["item"]


def fair_shares(loads: np.ndarray, amount: float) -> np.ndarray:
    """What each takes of an amount so that the fullest ends as low as possible."""
    ordered = np.sort(loads)
    levels = (amount + np.cumsum(ordered)) / np.arange(1, len(loads) + 1)
    return np.maximum(levels[np.flatnonzero(levels >= ordered)[-1]] - loads, 0.0)


def _cut(flows: np.ndarray, skip: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The given number of rows of each flow, after some that are left out."""
    parts = flows.copy()
    for name in ("row", "source_row", "target_row"):
        parts[name] += skip
    parts["height"] = height
    return parts


def schedule(flows: np.ndarray, senders: int, receivers: int, limit: int) -> np.ndarray:
    """Order flows in rounds of about `limit` bytes a receiver; at most twice that, or one row.

    Every receiver takes its senders in turn, each from another one on: at any time all senders are busy, and what goes
    between two ranks in a round is one large message.
    """
    rows = np.maximum(limit // (flows["width"] * flows["item"]), 1)
    counts = -(-flows["height"] // rows)
    index = np.repeat(np.arange(len(flows)), counts)
    skip = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows[index]
    parts = _cut(flows[index], skip, np.minimum(rows[index], flows["height"][index] - skip))
    turn = (parts["sender"] - parts["receiver"] * senders // max(receivers, 1)) % senders
    parts = parts[np.lexsort((turn, parts["receiver"]))]
    size = bytes_of(parts)
    before = np.cumsum(size) - size
    _, start = np.unique(parts["receiver"], return_index=True)
    mine = np.diff(np.append(start, len(parts)))
    parts["round"] = (before - np.repeat(before[start], mine)) // limit
    return parts
