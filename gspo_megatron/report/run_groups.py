"""Runs side by side: those that differ in nothing but the seed form a group; outcomes with intervals over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from gspo_megatron.config.refusal import refuse
from gspo_megatron.metric_rows import read_rows
from gspo_megatron.models import load_resolved
from gspo_megatron.report.intervals import of_difference, over_seeds
from gspo_megatron.report.provenance import read_starts
from gspo_megatron.report.run_figures import derive
from gspo_megatron.report.series import Series, read_series
from gspo_megatron.run_dir import RunDir

OF_THE_RUN = ("run.name", "run.seed", "run.directory", "cold_start.cache")
"""Keys in which the runs of a group may differ."""
OUTCOMES = (
    "eval/accuracy", "reward_mean", "answer_length", "truncated", "clip_fraction_sequences", "grad_norm",
    "token_entropy", "mismatch_k3", "experts/load_max_over_mean", "tokens_per_second", "seconds/step",
)  # fmt: skip
"""Metrics that are compared."""
LAST_SHARE = 10
"""The outcome is the mean over the last tenth of the steps; of an evaluation, the last one."""


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run."""

    name: str
    seed: int
    recipe: dict[str, Any]
    """Values by dotted key, those of OF_THE_RUN left out; and `code`, the git state that it was started with."""
    table: dict[str, Series]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one recipe."""

    name: str
    """A letter."""
    about: str
    """The keys in which the groups differ, with its values: `objective.preset=grpo`."""
    runs: tuple[ComparedRun, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a group reached in one metric."""

    group: str
    values: tuple[float, ...]
    """Of each run."""
    mean: float
    interval: tuple[float, float] | None
    """95 % of the mean over seeds; None for one run."""
    difference: float | None
    """To the first group; None for the first group itself."""
    difference_interval: tuple[float, float] | None


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs to compare.

    Raises:
        RecipeError: a directory holds no run, or a damaged one.
    """
    names = _short_names(directories)
    return [_read_run(directory, name) for directory, name in zip(directories, names, strict=True)]


def _short_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [directory.absolute().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(directory) for directory in directories]


def _read_run(directory: Path, name: str) -> ComparedRun:
    run = RunDir(directory)
    if not (run.metrics.is_file() and run.recipe.is_file()):
        raise refuse(
            "no-run", "run.directory", f"{directory} holds no {run.metrics.name} and {run.recipe.name}",
            "give directories that `gspo train` printed",
        )  # fmt: skip
    recipe = load_resolved(run.recipe)
    values = dict(_flatten(recipe.model_dump(mode="json")))
    starts = read_starts(run)
    code = {"code": starts[-1].get("git", "")} if starts else {}
    table = read_series(read_rows(directory))
    derive(table, recipe)
    kept = {key: value for key, value in values.items() if key not in OF_THE_RUN}
    return ComparedRun(name, recipe.run.seed, {**kept, **code}, table)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found


def differing_keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Keys of the recipe whose value is not the same in all runs, and `code`."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    return [key for key in keys if any(run.recipe.get(key) != runs[0].recipe.get(key) for run in runs)]


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Runs by recipe, in the order in which they were given; the code is no part of the recipe."""
    keys = [key for key in differing_keys(runs) if key != "code"]
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        name = ", ".join(f"{key}={run.recipe.get(key, 'not set')}" for key in keys)
        found.setdefault(name or "one recipe", []).append(run)
    return [Group(_letter(at), about, tuple(members)) for at, (about, members) in enumerate(found.items())]


def _letter(at: int) -> str:
    """A, B, ... Z, A2, B2, ..."""
    return ascii_uppercase[at % 26] + (str(at // 26 + 1) if at >= 26 else "")


def last_common_step(runs: Sequence[ComparedRun]) -> int:
    """The last step that every run has reached: outcomes are compared there."""
    return min(max((one.steps[-1] for one in run.table.values()), default=0) for run in runs)


def outcomes(groups: Sequence[Group], metric: str, step: int) -> list[Outcome]:
    """What each group reached by a step; a group without the metric is left out."""
    found: list[Outcome] = []
    base: tuple[float, ...] | None = None
    for group in groups:
        values = tuple(
            value for run in group.runs if (value := _reached(run.table.get(metric), metric, step)) is not None
        )
        if not values:
            continue
        difference = None if base is None else fmean(values) - fmean(base)
        interval = None if base is None else of_difference(values, base)
        found.append(Outcome(group.name, values, fmean(values), over_seeds(values), difference, interval))
        base = values if base is None else base
    return found


def _reached(series: Series | None, metric: str, step: int) -> float | None:
    values = [] if series is None else [v for s, v in zip(series.steps, series.values, strict=True) if s <= step]
    if not values:
        return None
    return values[-1] if metric.startswith("eval/") else fmean(values[-max(1, len(values) // LAST_SHARE) :])
