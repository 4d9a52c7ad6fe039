"""`gspo plan RECIPE --compare KEY=A,B ... [OTHER.yaml ...]`: one row a combination, or a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.estimate.calibration import TIME_RANGE
from gspo_megatron.plan.run_plan import Plan, make_plan
from gspo_megatron.plan.search import Least, search
from gspo_megatron.plan.suggest import apply
from gspo_megatron.plan.units import between
from gspo_megatron.types import Finding

SHORT = {"nodes": "placement.nodes", "gpu": "placement.gpu"}
"""Keys that may be written without their section."""
MOST_ROWS = 64
"""Rows of one table; a search takes seconds for each."""


@dataclass(frozen=True, slots=True)
class Row:
    """A planned variant. The numbers are null if it is refused."""

    variant: str
    """The recipe's file and the values that differ."""
    gpus: int
    """GPUs of the job; 0 if the recipe cannot be read."""
    layout: str
    """Parallel sizes, recomputation and servers."""
    seconds_per_step: float | None
    """Seconds of a step; see `seconds_range`."""
    gpu_hours: float | None
    """GPU-hours of `trainer.max_steps` steps."""
    peak_bytes: int | None
    """Bytes of the fullest trainer GPU."""
    refused: str
    """The first error; empty if there is none."""
    errors: tuple[str, ...] = ()
    """Codes of all errors."""
    warnings: tuple[str, ...] = ()
    """Codes of the warnings."""


def print_comparison(
    path: Path, overrides: Sequence[str], words: Sequence[str], searched: Least | None, as_json: bool
) -> int:
    """Print the table. Returns 0 if a variant would run, else 2.

    Args:
        words: `KEY=A,B` for values to combine, or further recipes.
        searched: take of each variant the layout, servers and placement with the least of this; null = its own.
    """
    rows = [_row(*variant, searched) for variant in _variants(path, overrides, words)]
    if as_json:
        shown = [asdict(row) for row in rows]
        print(json.dumps({"version": 1, "seconds_range": TIME_RANGE, "rows": shown}, indent=1))
    else:
        for line in _lines(rows):
            print(line)
    return 0 if any(not row.refused for row in rows) else 2


def _variants(path: Path, overrides: Sequence[str], words: Sequence[str]) -> Iterator[tuple[str, Path, list[str]]]:
    axes = [word for word in words if "=" in word]
    paths = [path, *(Path(word) for word in words if "=" not in word)]
    values = [[f"{_key(axis)}={value}" for value in _split(axis.partition("=")[2])] for axis in axes]
    rows = len(paths)
    for axis in values:
        rows *= len(axis)
    if rows > MOST_ROWS:
        raise refuse("too-many-variants", "--compare", f"{rows} variants, more than {MOST_ROWS}", "give fewer values")
    for one, chosen in product(paths, product(*values)):
        name = " ".join([*([one.stem] if len(paths) > 1 else []), *chosen]) or one.stem
        yield name, one, [*overrides, *chosen]


def _key(axis: str) -> str:
    key = axis.partition("=")[0]
    return SHORT.get(key, key)


def _split(text: str) -> list[str]:
    """Split at commas that are in no bracket: a value may be a list or a mapping."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _row(name: str, path: Path, overrides: list[str], searched: Least | None) -> Row:
    try:
        recipe = load_recipe(path, overrides)
        if searched:
            found = search(recipe, searched)[0]
            if found.layouts and found.servers:
                recipe = apply(recipe, found.change)
        plan = make_plan(recipe)
    except RecipeError as error:
        first = error.findings[0]
        said = f"{first.code}: {first.key}: {first.message}; {first.fix}"
        return Row(name, 0, "", None, None, None, said, _codes(error.findings, "error"))
    errors, warnings = _codes(plan.findings, "error"), _codes(plan.findings, "warning")
    gpus, sizes, work, stages = plan.machine.devices, _layout(recipe, plan), plan.compute, plan.memory
    if errors or work is None or stages is None:
        # Errors come first.
        refusal = f"{errors[0]}: {plan.findings[0].key}; {plan.findings[0].fix}" if errors else "cannot be planned"
        return Row(name, gpus, sizes, None, None, None, refusal, errors, warnings)
    peak = max(stage.peak_bytes for stage in stages)
    return Row(name, gpus, sizes, work.seconds_per_step, work.device_hours, peak, "", (), warnings)


def _codes(findings: Sequence[Finding], severity: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(finding.code for finding in findings if finding.severity == severity))


def _layout(recipe: Recipe, plan: Plan) -> str:
    if plan.layout is None:
        return ""
    grid = plan.layout
    sizes = (("TP", grid.tensor), ("CP", grid.context), ("PP", grid.pipeline), ("VPP", grid.virtual),
             ("EP", grid.expert), ("ETP", grid.expert_tensor))  # fmt: skip
    words = [f"{letters}{size}" for letters, size in sizes if size > 1]
    gpus = recipe.rollout.tensor_parallel * recipe.rollout.pipeline_parallel
    apart = f" on {recipe.placement.rollout_nodes} nodes" if recipe.placement.rollout_nodes else ""
    return " ".join([*words, recipe.trainer.recompute]) + f"; {recipe.rollout.servers} x {gpus}{apart}"


def _lines(rows: list[Row]) -> Iterator[str]:
    wide = max(len(row.variant) for row in rows)
    layouts = max(len("layout; servers"), *(len(row.layout) for row in rows))
    yield f"{'':<{wide}} {'GPUs':>5}  {'layout; servers':<{layouts}} {'s/step':>18} {'GPU-hours':>18} {'GB':>6}"
    for row in rows:
        start = f"{row.variant:<{wide}} {row.gpus:>5}  {row.layout:<{layouts}} "
        if row.seconds_per_step is None or row.gpu_hours is None or row.peak_bytes is None:
            yield f"{start}refused: {row.refused}"
            continue
        seconds, hours = (between(value, TIME_RANGE, "").strip() for value in (row.seconds_per_step, row.gpu_hours))
        yield f"{start}{seconds:>18} {hours:>18} {row.peak_bytes / 1e9:>6.1f}"
    runs = [row for row in rows if row.seconds_per_step is not None and row.gpu_hours is not None]
    if len(runs) > 1:
        fastest = min(runs, key=lambda row: row.seconds_per_step or 0)
        cheapest = min(runs, key=lambda row: row.gpu_hours or 0)
        yield f"fastest: {fastest.variant}; fewest GPU-hours: {cheapest.variant}"
    for row in rows:
        # The first error stands in the row.
        if row.warnings or len(row.errors) > 1:
            kinds = (("errors", row.errors), ("warnings", row.warnings))
            yield f"{row.variant}: " + "; ".join(f"{kind} {', '.join(codes)}" for kind, codes in kinds if codes)
