"""The rows of a run as one series for each metric, thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_POINTS = 600
"""Points of a series on the page."""
MOST_COLUMNS = 240
"""Steps of a map of layers."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric where it was recorded, in order of step; values are finite."""

    steps: list[int]
    values: list[float]

    def thin(self, most: int = MOST_POINTS) -> Series:
        """At most so many points, all of them recorded: the lowest and the highest of each stretch of steps, and the
        first and the last."""
        if len(self.steps) <= most:
            return self
        kept = {0, len(self.steps) - 1}
        for start, end in stretches(len(self.steps), (most - 2) // 2):
            part = self.values[start:end]
            kept |= {start + part.index(min(part)), start + part.index(max(part))}
        order = sorted(kept)
        return Series([self.steps[at] for at in order], [self.values[at] for at in order])


def stretches(length: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut range(length) into so many parts of about equal length: (start, end) of each."""
    return pairwise(length * part // parts for part in range(parts + 1))


def read_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Every metric of the rows of metrics.jsonl; what is no finite number is left out."""
    found: dict[str, Series] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if type(value) in (float, int) and math.isfinite(value):
                one = found.get(name)
                if one is None:
                    one = found[name] = Series([], [])
                one.steps.append(step)
                one.values.append(value)
    found.pop("step", None)
    return found


def align(*several: Series) -> tuple[list[int], list[list[float]]]:
    """The steps at which all were recorded, and the values of each there."""
    if all(one.steps == several[0].steps for one in several):
        return several[0].steps, [one.values for one in several]
    tables = [dict(zip(one.steps, one.values, strict=True)) for one in several]
    steps = [step for step in several[0].steps if all(step in table for table in tables)]
    return steps, [[table[step] for step in steps] for table in tables]


def thin_band(steps: list[int], rows: Sequence[list[float]], most: int = MOST_POINTS) -> tuple[list[int], list[Any]]:
    """Thin a band.

    Args:
        steps: [N] steps.
        rows: its lower edges [N] first, its upper edges [N] last, lines [N] within it between.
        most: points that are left.

    Returns:
        The last step of each stretch; of each stretch the lowest lower edge, the highest upper edge, and of a line its
        value at that step.
    """
    if len(steps) <= most:
        return steps, list(rows)
    cuts = list(stretches(len(steps), most))
    low, *lines, high = rows
    thinned = [[min(low[start:end]) for start, end in cuts]]
    thinned += [[line[end - 1] for _, end in cuts] for line in lines]
    thinned.append([max(high[start:end]) for start, end in cuts])
    return [steps[end - 1] for _, end in cuts], thinned
