"""`gspo compare`: tables for the terminal, and a page that lays the curves of runs over each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gspo_megatron.cluster.shared_files import replace_text
from gspo_megatron.report.intervals import over_seeds
from gspo_megatron.report.metric_names import NAMES
from gspo_megatron.report.page import MADE_BY, make_page
from gspo_megatron.report.panels import Json, Panel, describe, figure, number
from gspo_megatron.report.run_groups import (
    OUTCOMES,
    ComparedRun,
    Group,
    Outcome,
    differing_keys,
    group_runs,
    last_common_step,
    outcomes,
)
from gspo_megatron.report.series import align

SCRIPTS = ("figures.js", "compare.js")
HEAD_BYTES = 2000
OVERLAYS: dict[str, tuple[str, ...]] = {
    "Reward and accuracy": ("eval/accuracy", "reward_mean"),
    "Sequence ratio and clipping": ("log_s_p01", "log_s_p99", "clip_fraction_sequences", "clip_fraction_tokens"),
    "Routers": ("experts/load_max_over_mean", "experts/changed"),
    "Gradient norm, entropy, mismatch": ("grad_norm", "token_entropy", "mismatch_k3"),
    "Length, truncation, staleness": ("answer_length", "truncated", "staleness_mean"),
    "Time": ("seconds/step", "tokens_per_second", "idle/trainers"),
}
"""Figures of the page, by title: the metrics of their panels."""


def write_comparison(runs: Sequence[ComparedRun], page: Path) -> None:
    """Write the page.

    Raises:
        FileExistsError: the file is there, and is no page of ours.
    """
    if page.exists() and not _is_ours(page):
        raise FileExistsError(page)
    replace_text(page, make_page(compare(runs), SCRIPTS))


def _is_ours(page: Path) -> bool:
    with page.open("rb") as file:
        return MADE_BY.encode() in file.read(HEAD_BYTES)


def compare(runs: Sequence[ComparedRun]) -> Json:
    """What the page shows."""
    groups, step = group_runs(runs), last_common_step(runs)
    series = {
        f"{run.name}: {metric}": {"x": (thin := run.table[metric].thin()).steps, "y": thin.values}
        for run in runs
        for metric in dict.fromkeys(name for names in OVERLAYS.values() for name in names)
        if metric in run.table
    }
    figures = [
        figure(f"overlay{place}", title, "", *(_overlay(groups, metric) for metric in metrics))
        for place, (title, metrics) in enumerate(OVERLAYS.items())
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "objective": _about(groups, step),
        "outcomes": [[label, *row] for label, rows in _outcome_rows(groups, step) for row in rows],
        "differences": _differences(runs),
        "runs_in_order": [run.name for run in runs],
        "runs": [[group.name, run.name, str(run.seed), group.about] for group in groups for run in group.runs],
        "figures": [one for one in figures if one is not None],
        "series": series,
        "live": False,
    }


def _about(groups: Sequence[Group], step: int) -> str:
    return (
        f"Outcomes at step {step}, the last that every run has reached: the last evaluation, and else the mean of the "
        "last tenth of the steps. Intervals are 95 % over the seeds of a group (Student's t; of a difference, Welch's) "
        f"and need 2 seeds. Differences are to the first group, {groups[0].name}: {groups[0].about}."
    )


def _overlay(groups: Sequence[Group], metric: str) -> Panel:
    """Each run's curve in the colour of its group; of a group of seeds also the interval of its mean."""
    panel = Panel(NAMES[metric].capitalize(), metric, log=metric in ("grad_norm", "mismatch_k3"), from_zero=False)
    for colour, group in enumerate(groups):
        members = [run for run in group.runs if metric in run.table]
        if len(members) > 1:
            steps, rows = align(*(run.table[metric] for run in members))
            ends = [over_seeds(values) or (values[0], values[0]) for values in zip(*rows, strict=True)]
            if steps and not panel.log:
                panel.band(
                    steps, [low for low, _ in ends], [high for _, high in ends], f"{group.name}, 95 % of the mean"
                )
                panel.traces[-1]["colour"] = colour
        for place, run in enumerate(members):
            name = f"{group.name}: {group.about}" if place == 0 else run.name
            trace = {"kind": "line", "name": name, "series": f"{run.name}: {metric}", "shade": None}
            panel.traces.append(trace | {"colour": colour, "group": f"g{colour}", "first": place == 0})
            panel.said.append(describe(run.name, run.table[metric]))
    return panel


def _outcome_rows(groups: Sequence[Group], step: int) -> Iterator[tuple[str, list[list[str]]]]:
    """Of each metric that was recorded: a row a group with runs, mean, interval, difference, interval, each run."""
    for metric in OUTCOMES:
        found = outcomes(groups, metric, step)
        if found:
            yield NAMES[metric], [_row(one) for one in found]


def _row(one: Outcome) -> list[str]:
    return [
        one.group,
        str(len(one.values)),
        number(one.mean),
        _ends(one.interval),
        "" if one.difference is None else f"{one.difference:+.4g}",
        _ends(one.difference_interval),
        ", ".join(map(number, one.values)),
    ]


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def _differences(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """A row a key of the recipe that differs: the key, and its value in each run."""
    return [[key, *(str(run.recipe.get(key, "not set")) for run in runs)] for key in differing_keys(runs)]


def _plain_table(*headings: str) -> Table:
    return Table(*headings, box=None, padding=(0, 2, 0, 0))


def describe_comparison(runs: Sequence[ComparedRun]) -> RenderableType:
    """The same for the terminal."""
    groups, step = group_runs(runs), last_common_step(runs)
    parts: list[RenderableType] = []
    differences = _differences(runs)
    if differences:
        table = _plain_table("key", *(run.name for run in runs))
        for row in differences:
            table.add_row(*map(Text, row))
        parts.append(Text("Differences of the recipes", style="bold"))
        parts.append(table)
    else:
        parts.append(Text("The recipes differ in nothing but name, directory and seed."))
    for group in groups:
        seeds = ", ".join(f"{run.name} (seed {run.seed})" for run in group.runs)
        parts.append(Text.assemble(("\n" if group is groups[0] else "") + f"{group.name}  ", group.about, f": {seeds}"))
    parts.append(Text(f"\nOutcomes at step {step}", style="bold"))
    table = _plain_table("metric", "group", "runs", "mean", "95 %", "difference", "95 %")
    for label, rows in _outcome_rows(groups, step):
        for place, row in enumerate(rows):
            table.add_row(label if place == 0 else "", *map(Text, row[:-1]))
    return Lines(*parts, table)
