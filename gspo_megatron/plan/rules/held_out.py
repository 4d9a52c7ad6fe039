"""Rules of `gspo eval`: what a recipe must have to be evaluated with given weights."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding


def findings(recipe: Recipe) -> Iterator[Finding]:
    """Why there is nothing to evaluate, or nothing to gain from it."""
    section = recipe.evaluation
    if recipe.planned_evaluation == 0:
        yield Finding(
            "eval-no-problems", "error", "evaluation.problems", "0 problems are nothing to evaluate",
            "set evaluation.problems to how many of the held-out ones count",
        )  # fmt: skip
    if section.temperature == 0 and section.answers > 1:
        yield Finding(
            "eval-equal-answers", "warning", "evaluation.answers",
            f"{section.answers} greedy responses to a problem are all the same",
            "set evaluation.temperature=1, or evaluation.answers=1",
        )  # fmt: skip
