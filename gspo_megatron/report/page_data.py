"""What the page of a run shows, as one object; assets/page.js makes the page from it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.config import Recipe, RecipeError
from gspo_megatron.metric_rows import read_rows, read_warnings
from gspo_megatron.models import load_resolved
from gspo_megatron.report.intervals import wilson
from gspo_megatron.report.panels import Json, number
from gspo_megatron.report.plots import describe_evaluations
from gspo_megatron.report.provenance import read_starts
from gspo_megatron.report.response_pages import Catalogue
from gspo_megatron.report.run_figures import derive, make_figures
from gspo_megatron.report.run_state import RunState, duration, read_state
from gspo_megatron.report.series import MOST_POINTS, Series, read_series
from gspo_megatron.run_dir import ATTEMPT, RunDir

LAST_ROWS = 100
"""Rows of the table of steps."""
COLUMNS = {
    "step": "step", "eval/accuracy": "held-out accuracy", "reward_mean": "sampled reward",
    "answer_length": "answer length", "clip_fraction_sequences": "clipped sequences",
    "log_s_abs_max/minibatch_0": "max |log s|, mini-batch 0", "grad_norm": "gradient norm",
    "mismatch_k3": "mismatch k3", "canary_mean": "canary mean", "canary_largest": "canary largest",
    "seconds/step": "seconds",
}  # fmt: skip


def read_run(run_dir: Path, live: bool = False, rows: list[dict[str, Any]] | None = None) -> Json:
    """All that the page shows of a run.

    Args:
        run_dir: its directory; files may be missing, or be written meanwhile.
        live: a server answers for its responses, so that none are drawn.
        rows: of metrics.jsonl in order of step, where they are at hand.

    Raises:
        RecipeError: metrics.jsonl is damaged.
    """
    run, notes = RunDir(run_dir), list[str]()
    rows = read_rows(run_dir) if rows is None else rows
    recipe = _load_recipe(run, notes)
    table = read_series(rows)
    derive(table, recipe)
    state = read_state(run, rows, None if recipe is None else recipe.trainer.max_steps)
    if len(rows) > MOST_POINTS:
        notes.append(
            f"Of {len(rows):,} steps a line shows the lowest and the highest value of each of {MOST_POINTS // 2 - 1} "
            "stretches; every value is in metrics.jsonl."
        )
    return {
        "title": run_dir.absolute().name,
        "objective": _read(run.objective),
        "state": {"kind": state.kind, "text": state.text},
        "tiles": _tiles(table, state),
        "health": _health(run, notes),
        "notes": notes,
        "figures": make_figures(table, recipe),
        "series": {
            name: {"x": (thin := one.thin()).steps, "y": thin.values}
            for name, one in table.items()
            if "/layer_" not in name
        },
        "steps": _steps(rows),
        "evaluated": _evaluated(run, rows),
        "responses": _responses(run, live, notes),
        "facts": _facts(run, recipe),
        "recipe": _read(run.recipe),
        "live": live,
        "footer": f"{run_dir.absolute()}, read {time.strftime('%Y-%m-%d %H:%M:%S %Z')}.",
    }


def _health(run: RunDir, notes: list[str]) -> list[Json] | None:
    """The warnings; None with a note where they are not known."""
    if not run.warnings.is_file():
        notes.append("This run kept no list of its warnings; they are in the log of trainer rank 0.")
        return None
    try:
        return group_warnings(read_warnings(run.path))
    except (RecipeError, OSError, KeyError) as error:
        notes.append(f"The list of warnings cannot be read: {error}")
        return None


def group_warnings(warnings: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Each kind of warning once, with the text of its last time: `first`, `last` step, `count`; errors first."""
    found: dict[tuple[str, str], Json] = {}
    for one in warnings:
        name = (one["severity"], one["code"])
        old = found.get(name, {"first": one["step"], "count": 0})
        found[name] = {**one, "first": old["first"], "last": one["step"], "count": old["count"] + 1}
    rank = {"error": 0, "warning": 1}
    return sorted(found.values(), key=lambda one: (rank.get(one["severity"], 2), one["first"]))


def _load_recipe(run: RunDir, notes: list[str]) -> Recipe | None:
    """The recipe; None with a note where it is missing, or cannot be read by this version."""
    try:
        return load_resolved(run.recipe) if run.recipe.is_file() else None
    except (RecipeError, OSError) as error:
        notes.append(f"The recipe cannot be read, so the clip band and the limits are not shown: {error}")
        return None


def _tiles(table: Mapping[str, Series], state: RunState) -> list[Json]:
    tiles: list[Json] = []

    def add(label: str, metric: str, note: str = "") -> None:
        if metric in table:
            one = table[metric]
            first = f"{number(one.values[0])} at step {one.steps[0]}" if len(one.steps) > 1 else ""
            tiles.append({"label": label, "value": number(one.values[-1]), "note": note or first})

    if "eval/accuracy" in table and "eval/problems" in table:
        accuracy = table["eval/accuracy"].values
        low, high = wilson(accuracy[-1], table["eval/problems"].values[-1])
        add("Held-out accuracy", "eval/accuracy", f"95 %: {low:.3f} to {high:.3f}; {number(accuracy[0])} at first")
    add("Reward", "reward_mean")
    add("Clipped sequences", "clip_fraction_sequences")
    add("Gradient norm", "grad_norm")
    add("Mismatch k3", "mismatch_k3")
    add("Response length", "answer_length")
    if state.seconds_per_step is not None:
        rate = table.get("tokens_per_second")
        note = f"{number(rate.values[-1])} trained tokens a second" if rate and rate.values else ""
        tiles.append({"label": "Time of a step", "value": duration(state.seconds_per_step), "note": note})
    return tiles


def _steps(rows: Sequence[Mapping[str, Any]]) -> Json:
    shown = [[row.get(name) for name in COLUMNS] for row in rows[-LAST_ROWS:]]
    return {
        "columns": list(COLUMNS.values()),
        "rows": [[_finite(one) for one in row] for row in shown],
        "total": len(rows),
    }


def _finite(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) < float("inf") else None


def _evaluated(run: RunDir, rows: Sequence[Mapping[str, Any]]) -> Json:
    """Responses of the last evaluation, and how it sampled."""
    try:
        items = json.loads(_read(run.examples) or "[]")
    except ValueError:  # being written
        items = []
    last = next((row for row in reversed(rows) if "eval/accuracy" in row), None)
    facts = [] if last is None else [f"step {last['step']}", describe_evaluations([dict(last)])]
    return {"about": ", ".join(filter(None, facts)), "items": items if isinstance(items, list) else []}


def _responses(run: RunDir, live: bool, notes: list[str]) -> Json | None:
    colours = (
        "Colours: the log-ratio of a token, its log-prob in the training pass less the sampler's, where it is stored; "
        "else its log-prob under the sampler."
    )
    if not run.samples.is_dir() or not run.recipe.is_file():
        return None
    if live:
        return {"stated": f"Every response that the run still keeps (rollout.keep_samples). {colours}", "items": []}
    try:
        total, items = Catalogue(run).draw()
    except (RecipeError, OSError, ValueError) as error:
        notes.append(f"The sampled responses cannot be read: {error}")
        return None
    steps = len({one["step"] for one in items})
    stated = (
        f"A sample: {len(items)} of the {total:,} responses of {steps} of the kept steps, at equal distances. "
        f"gspo watch --web reads all of them. {colours}"
    )
    return {"stated": stated, "items": items}


def _facts(run: RunDir, recipe: Recipe | None) -> list[tuple[str, str]]:
    facts = [("Objective", _read(run.objective))]
    if recipe is not None:
        t, r, b, arch = recipe.trainer, recipe.rollout, recipe.batch, recipe.arch
        sizes = {"TP": t.tensor_parallel, "PP": t.pipeline_parallel, "CP": t.context_parallel,
                 "EP": t.expert_parallel, "ETP": t.expert_tensor_parallel}  # fmt: skip
        cut = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "data-parallel only"
        ranks = len(list(run.heartbeat.glob("trainer-*.json"))) or t.ranks
        facts += [
            ("Model", f"{arch.model_type}, {arch.num_hidden_layers} layers, {recipe.model.dtype}, from "
                      f"{recipe.model.path or 'a cold start'}"),
            ("Layout", f"{ranks or 'all'} trainer ranks ({cut}); {r.servers} servers of {r.tensor_parallel} devices"),
            ("Batch", f"{b.prompts} prompts x {b.answers} responses in {b.updates} updates, at most "
                      f"{r.max_answer_tokens:,} tokens, staleness at most {r.max_staleness}"),
            ("Optimizer", f"learning rate {recipe.optimizer.lr:g}, {t.max_steps} steps, seed {recipe.run.seed}"),
        ]  # fmt: skip
    starts = read_starts(run)
    if starts:
        last = starts[-1]
        often = f", {len(starts)} times" if len(starts) > 1 else ""
        packages = ", ".join(f"{name} {found}" for name, found in last.get("packages", {}).items())
        facts += [
            ("Code", f"gspo-megatron {last.get('gspo')}, {last.get('git') or 'no git checkout'}"),
            ("Packages", f"Python {last.get('python')}, {packages}"),
            ("Started", f"{starts[0].get('at')} on {last.get('host')}{often}"),
        ]  # fmt: skip
    attempts = len(ATTEMPT.find(run.logs))
    return facts + ([("Attempts", str(attempts))] if attempts > 1 else [])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    except OSError:
        return ""
