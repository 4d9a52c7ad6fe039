"""Rules of metric sinks: whether a user's own is one, and whether what the others import is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

from gspo_megatron.config.hooks import is_reference
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.metrics_section import SINK_PACKAGES
from gspo_megatron.config.schema import Recipe
from gspo_megatron.sinks.sink_threads import load_sink
from gspo_megatron.types import Finding


def findings(recipe: Recipe, runs_here: bool) -> Iterator[Finding]:
    """Check the sinks of a recipe.

    Args:
        recipe: names the sinks.
        runs_here: whether rank 0 would run in this environment.
    """
    for name in recipe.metrics.sinks:
        if is_reference(name):
            yield from _own(name)
        modules, packages = SINK_PACKAGES.get(name, ((), ""))
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            fix = f"uv pip install --python {sys.prefix}/bin/python {packages}"
            yield Finding(
                "metric-sink-missing", "error" if runs_here else "warning", "metrics.sinks",
                f"{name} needs {', '.join(missing)}, not found here",
                f"install it where the trainer runs: {fix}, or remove {name}",
            )  # fmt: skip


def _own(name: str) -> Iterator[Finding]:
    try:
        load_sink(name)
    except RecipeError as error:
        yield from error.findings
