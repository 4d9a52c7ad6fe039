"""The scorer of a recipe: one of the named scores, with the recipe's rules around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import DataSection, RewardSection
from gspo_megatron.rewards import gym, mathematics
from gspo_megatron.types import Problem, StopReason

log = logging.getLogger(__name__)

Score = Callable[[DataSection, Problem, str], float]
"""(data section, problem, text) -> score; text carries no whitespace around it and is never empty."""

SCORES: dict[str, Score] = {"reasoning_gym": gym.score, "math_verify": mathematics.score}
"""Names that `reward.name` may hold."""
LOADERS: dict[str, Callable[[DataSection], None]] = {"reasoning_gym": gym.load, "math_verify": mathematics.load}
"""What each of them imports."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Callable score of one answer. Picklable, so that a process pool can share the work; math_verify needs one."""

    reward: RewardSection
    """Which score, and the rules around it."""
    data: DataSection
    """Names the task whose own scorer is asked."""

    def __call__(self, problem: Problem, text: str, stop_reason: StopReason) -> float:
        """Score in [0, 1] of any text whatever."""
        if self.reward.require_stop and stop_reason != "stop":
            return 0.0
        judged = (text.rpartition(self.reward.answer_marker)[2] if self.reward.answer_marker else text).strip()
        if not judged:
            return 0.0
        if self.reward.name == "math_verify":
            mathematics.check_thread()  # outside of the `try`: this is the program's fault, not the answer's
        try:
            score = float(SCORES[self.reward.name](self.data, problem, judged))
        # A task's scorer parses what a model wrote: whatever it raises on such a text, the text is no answer.
        except Exception:
            log.warning(
                "reward.name=%s failed on problem %s; its answer scores 0", self.reward.name, problem.id, exc_info=True
            )
            return 0.0
        if not math.isfinite(score):
            return 0.0
        return float(score >= 1.0) if self.reward.exact else min(max(score, 0.0), 1.0)


def make_scorer(recipe: Recipe) -> Scorer:
    """The scorer of a recipe: `scorer(problem, text, stop_reason) -> score`. Call it in the process that scores."""
    LOADERS[recipe.reward.name](recipe.data)
    return Scorer(recipe.reward, recipe.data)
