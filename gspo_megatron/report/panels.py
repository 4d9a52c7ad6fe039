"""Parts of a figure as plain data: assets/figures.js draws them with Plotly.

A figure is `{id, title, about, panels}`, a panel `{title, unit, traces, limits, log, text}`. A trace has a `kind`:

    line    {name, series, shade}            a metric; `series` is its name in the table of series
    band    {name, x, low, high, depth}      the area between two lines; the deeper, the darker
    points  {name, x, y, low, high}          markers with intervals
    heat    {x, y, z, unit, marks}           a map: x steps, y layers, z [layers][steps]
    area    {name, x, y}                     stacked on the one before
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.report.series import MOST_COLUMNS, MOST_POINTS, Series, align, stretches, thin_band

Table = Mapping[str, Series]
"""Series by metric."""
Json = dict[str, Any]


@dataclass(slots=True)
class Panel:
    """One pair of axes."""

    title: str
    unit: str = ""
    log: bool = False
    from_zero: bool = True
    """Whether 0 is on a linear axis."""
    traces: list[Json] = field(default_factory=list)
    limits: list[Json] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def line(self, table: Table, metric: str, name: str, shade: float | None = None) -> None:
        """Add a metric, where it was recorded; `shade` in [0, 1] for one of a sequence of lines."""
        if metric in table:
            self.traces.append({"kind": "line", "name": name, "series": metric, "shade": shade})
            self.said.append(describe(name, table[metric]))

    def lines(self, table: Table, prefix: str, name: str) -> None:
        """Add the metrics `prefix` and a number, one shade each."""
        numbers = members(table, prefix)
        for place, number in enumerate(numbers):
            self.line(table, f"{prefix}{number}", f"{name} {number}", shade_of(place, len(numbers)))

    def band(self, steps: list[int], low: list[float], high: list[float], name: str, depth: int = 0) -> None:
        """Add the area between two lines; the deeper, the darker."""
        x, (lows, highs) = thin_band(steps, (low, high))
        self.traces.append({"kind": "band", "name": name, "x": x, "low": lows, "high": highs, "depth": depth})

    def limit(self, value: float | None, text: str) -> None:
        """Add a level that the lines are to be read against."""
        if value is not None:
            self.limits.append({"y": value, "text": text})

    def span(self, low: float, high: float, text: str) -> None:
        """Add a stretch of the axis within which something holds."""
        self.limits.append({"y": low, "to": high, "text": text})

    def as_json(self) -> Json:
        """The panel for the page."""
        limits = [
            f"{limit['text']}: {number(limit['y'])}" + (f" to {number(limit['to'])}" if "to" in limit else "")
            for limit in self.limits
        ]
        return {
            "title": self.title, "unit": self.unit, "log": self.log, "from_zero": self.from_zero,
            "traces": self.traces, "limits": self.limits,
            "text": f"{self.title}. " + "; ".join([*self.said, *limits]) + ".",
        }  # fmt: skip


def shade_of(place: int, count: int) -> float | None:
    """Shade of one of several lines in an order; a single line has a colour of its own."""
    return place / (count - 1) if count > 1 else None


def figure(name: str, title: str, about: str, *panels: Panel) -> Json | None:
    """A figure of the panels that have something to show; None where none has."""
    shown = [panel.as_json() for panel in panels if panel.traces]
    return {"id": name, "title": title, "about": about, "panels": shown} if shown else None


def number(value: float) -> str:
    """A number for people."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def describe(name: str, series: Series) -> str:
    """A line in words: its ends and its range."""
    steps, values = series.steps, series.values
    low, high = min(values), max(values)
    ends = f"{number(values[0])} at step {steps[0]}"
    if len(steps) > 1:
        ends += f", {number(values[-1])} at step {steps[-1]}, between {number(low)} and {number(high)}"
    return f"{name}: {ends}"


def members(table: Table, prefix: str) -> list[int]:
    """The numbers of the metrics `prefix` and a number, in order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    return sorted(int(match[1]) for name in table if (match := pattern.fullmatch(name)))


def heat(table: Table, metric: str, title: str, unit: str) -> Panel:
    """A map of a metric by layer and step. A cell of several steps shows the largest value."""
    panel, layers = Panel(title, unit), members(table, f"{metric}/layer_")
    if not layers:
        return panel
    names = [f"{metric}/layer_{layer}" for layer in layers]
    steps, rows = align(*(table[name] for name in names))
    if steps:
        cuts = list(stretches(len(steps), min(len(steps), MOST_COLUMNS)))
        z = [[max(row[start:end]) for start, end in cuts] for row in rows]
        x = [steps[end - 1] for _, end in cuts]
        panel.traces.append({"kind": "heat", "x": x, "y": layers, "z": z, "unit": unit})
        panel.said += [describe(f"layer {layer}", table[name]) for layer, name in zip(layers, names, strict=True)]
    return panel


def areas(panel: Panel, table: Table, names: Sequence[tuple[str, str]], every: list[int]) -> None:
    """Add stacked metrics over the same steps; where one was not recorded it is 0."""
    cuts = list(stretches(len(every), min(len(every), MOST_POINTS // 2)))
    for metric, label in names:
        if metric in table and not set(every).isdisjoint(table[metric].steps):
            values = dict(zip(table[metric].steps, table[metric].values, strict=True))
            y = [sum(values.get(step, 0.0) for step in every[a:b]) / (b - a) for a, b in cuts]
            x = [every[b - 1] for _, b in cuts]
            panel.traces.append({"kind": "area", "name": label, "x": x, "y": y})
            panel.said.append(describe(label, table[metric]))
