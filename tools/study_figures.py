"""The figures of the study, from its kept summaries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from tools.study_statistics import estimate
from tools.study_summary import outcome

if TYPE_CHECKING:
    from tools.study_tables import Kept

# Okabe and Ito's colours, which people tell apart whatever they see of red and green.
COLOURS = {
    "gspo": "#0072B2", "grpo": "#D55E00", "gspo_token": "#56B4E9", "grpo_r2": "#E69F00", "grpo_r3": "#CC79A7",
    "ppo": "#009E73",
}  # fmt: skip
PAIR = ("gspo", "grpo")
WIDTH, HEIGHT, ACROSS = 3.4, 2.6, 3


def draw(kept: Kept, name: str, file: Path) -> Path:
    """Draw one of `study_tables.ALTERNATIVES`; returns the file."""
    panels = {"main": _main, "stressors": _stressors, "combined": _combined}[name](kept)
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    size = (7.5, 4.2) if len(panels) == 1 else (WIDTH * across, HEIGHT * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, sharey=True)
    for axis, (title, fill_panel) in zip(axes.flat, panels, strict=False):
        fill_panel(axis)
        axis.set_title(title, fontsize="medium")
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("held-out accuracy")
    axes.flat[0].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return file


def _main(kept: Kept) -> list[Any]:
    return [("no stressor", lambda axis: [_curve(axis, kept, name, "base") for name in kept.grid.algorithms])]


def _combined(kept: Kept) -> list[Any]:
    settings = [f"combined-{value}" for value in kept.grid.stressors["combined"].values]
    done = [
        one for one in settings if any(kept.lookup(name, one, seed) for name in PAIR for seed in kept.seeds(name, one))
    ]

    def panel(setting: str) -> Any:
        return lambda axis: [_curve(axis, kept, name, setting) for name in PAIR]

    return [(setting.removeprefix("combined-"), panel(setting)) for setting in done]


def _curve(axis: Any, kept: Kept, algorithm: str, setting: str) -> None:
    """Accuracy by step: mean over seeds, their interval as a band, each seed as a faint line."""
    found = [kept.lookup(algorithm, setting, seed) for seed in kept.seeds(algorithm, setting)]
    curves = [dict(map(tuple, summary["accuracy"])) for summary in found if summary is not None]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = [estimate([curve[step] for curve in curves]) for step in steps]
    means = [float("nan") if point is None else point.mean for point in points]
    title = f"{kept.grid.algorithms[algorithm].title}, {len(curves)} seed{'s' if len(curves) > 1 else ''}"
    axis.plot(steps, means, "o-", markersize=3, color=COLOURS[algorithm], label=title)
    bands = [
        point.interval if point and point.interval else (mean, mean) for point, mean in zip(points, means, strict=True)
    ]
    axis.fill_between(steps, *zip(*bands, strict=True), color=COLOURS[algorithm], alpha=0.15, linewidth=0)
    axis.set_xlabel("rollout batch")


def _stressors(kept: Kept) -> list[Any]:
    names = [name for name in kept.grid.stressors if name not in ("base", "combined")]

    def panel(name: str) -> Any:
        return lambda axis: [_points(axis, kept, algorithm, name) for algorithm in PAIR]

    return [(kept.grid.stressors[name].title, panel(name)) for name in names]


def _points(axis: Any, kept: Kept, algorithm: str, name: str) -> None:
    """Accuracy at the end by value of a stressor, the recipe's own value included."""
    stressor = kept.grid.stressors[name]
    settings = {value: f"{name}-{value}" for value in stressor.values}
    if stressor.base is not None:
        settings[stressor.base] = "base"
    order = sorted(settings, key=_place)
    axis.set_xticks(range(len(order)), order)
    for place, value in enumerate(order):
        found = [kept.lookup(algorithm, settings[value], seed) for seed in kept.seeds(algorithm, settings[value])]
        finals = [final for one in found if one is not None and (final := outcome(one, "final")) is not None]
        at = place + (0.08 if algorithm == PAIR[1] else -0.08)
        point = estimate(finals)
        if point is not None:
            low, high = point.interval or (point.mean, point.mean)
            label = kept.grid.algorithms[algorithm].title if value == stressor.base else None
            axis.plot([at], [point.mean], "o", color=COLOURS[algorithm], label=label)
            axis.plot([at, at], [low, high], "-", color=COLOURS[algorithm])


def _place(value: str) -> tuple[int, float, str]:
    """Numbers by size, then names."""
    try:
        return 0, float(value), ""
    except ValueError:
        return (1, 0.0, value) if value != "float32" else (0, 0.0, value)
