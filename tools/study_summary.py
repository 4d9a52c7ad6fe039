"""What the study keeps of a run: a few numbers and two curves, small enough for the repository."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.study_grid import Cell, Collapse

MEANS = (
    "clip_fraction_tokens", "clip_fraction_sequences", "grad_norm", "token_entropy", "policy_k3", "log_s_std",
    "experts/changed", "experts/probe_changed", "experts/route_bytes_per_token", "experts/load_max_over_mean",
    "mismatch_k3", "staleness_mean", "answer_length", "truncated", "zero_coefficient_tokens", "seconds/step",
)  # fmt: skip
"""Metrics whose mean over the trained steps is kept."""
LARGEST = ("grad_norm", "canary_largest", "mismatch_abs_max", "staleness_largest")
"""Metrics whose largest value is kept."""
DIGITS = 4
"""Significant digits that are kept."""
OUTCOMES = {
    "final": "held-out accuracy at the end",
    "best": "best held-out accuracy",
    "area": "held-out accuracy, mean of the evaluations after step 0",
    "fall": "largest fall of held-out accuracy below its best before",
    "reward": "sampled reward, mean over the run",
    "collapsed": "share of collapsed runs",
    "tokens": "trained tokens",
}
"""What is computed of a summary, beside the metrics in it."""


def summarize(rows: Sequence[Mapping[str, Any]], collapse: Collapse, ended: str = "finished") -> dict[str, Any]:
    """Keep what the tables and figures need of the rows of metrics.jsonl.

    Args:
        rows: by step; row 0 is the evaluation before training.
        collapse: its definition.
        ended: `finished`, or why the run ended before its last step.
    """
    trained = [row for row in rows if "reward_mean" in row]
    accuracy = [(row["step"], _short(row["eval/accuracy"])) for row in rows if "eval/accuracy" in row]
    means = {name: [row[name] for row in trained if _is_number(row.get(name))] for name in MEANS}
    largest = {name: [row[name] for row in trained if _is_number(row.get(name))] for name in LARGEST}
    return {
        "ended": ended,
        "steps": rows[-1]["step"] if rows else 0,
        "accuracy": accuracy,
        "reward": [_short(row["reward_mean"]) for row in trained],
        "mean": {name: _short(fmean(values)) for name, values in means.items() if values},
        "largest": {name: _short(max(values)) for name, values in largest.items() if values},
        "trained_tokens": int(sum(row.get("trained_tokens", 0) for row in trained)),
        "skipped_updates": max((row.get("skipped_updates", 0) for row in trained), default=0),
        "collapsed_at": rows[-1]["step"] if rows and ended != "finished" else collapsed_at(accuracy, collapse),
    }


def collapsed_at(accuracy: Sequence[tuple[int, float]], collapse: Collapse) -> int | None:
    """Step of the first evaluation of a collapse; None = there was none.

    A value is fallen if it is `drop` below the best before it, below half of that best, or not finite. A collapse is
    `evaluations` fallen values in a row.
    """
    best, run = -math.inf, []
    for step, value in accuracy:
        fallen = not math.isfinite(value) or value <= best - collapse.drop or value < best / 2
        run = [*run, step] if fallen else []
        if len(run) == collapse.evaluations:
            return run[0]
        best = max(best, value) if math.isfinite(value) else best
    return None


def outcome(summary: Mapping[str, Any], name: str) -> float | None:
    """One of OUTCOMES, or a metric of the summary by name (`largest/grad_norm`); None where the run has none."""
    values = [value for _, value in summary["accuracy"]]
    if name == "collapsed":
        return float(summary["collapsed_at"] is not None)
    if name == "tokens":
        return float(summary["trained_tokens"])
    if name == "reward":
        return fmean(summary["reward"]) if summary["reward"] else None
    if name in OUTCOMES:
        if len(values) < 2:
            return None
        best = itertools.accumulate(values, max)
        fall = max(high - value for high, value in zip(best, values, strict=True))
        return {"final": values[-1], "best": max(values), "area": fmean(values[1:]), "fall": fall}[name]
    if name.startswith("largest/"):
        return summary["largest"].get(name.removeprefix("largest/"))
    return summary["mean"].get(name)


def read_summaries(folder: Path, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The kept summaries by name of the cell. One whose cell has changed since is not that cell's, and is left out."""
    found = {}
    for cell in cells:
        file = folder / f"{cell.name}.json"
        if file.is_file() and (summary := json.loads(file.read_text()))["digest"] == cell.digest:
            found[cell.name] = summary
    return found


def write_summary(folder: Path, cell: Cell, facts: Mapping[str, Any], summary: Mapping[str, Any]) -> Path:
    """Write the summary of a cell whole or not at all; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "cell": cell.name,
        "digest": cell.digest,
        "overrides": list(cell.overrides),
        "router_noise": cell.router_noise,
    }
    file, part = folder / f"{cell.name}.json", folder / f".{cell.name}.part"
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in {**about, **facts, **summary}.items()]
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(file)
    return file


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
