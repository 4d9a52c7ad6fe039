"""The scorer of a recipe: a named score, and the rules of the `reward` section around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import DataSection, RewardSection
from gspo_megatron.rewards import gym, mathematics
from gspo_megatron.rewards.answer_text import strip_thinking
from gspo_megatron.rewards.time_limit import check_main_thread
from gspo_megatron.types import Problem, StopReason

Score = Callable[[DataSection, Problem, str], float]
"""(data section, problem, text) -> score. The text is stripped and never empty."""


def _score_mathematics(data: DataSection, problem: Problem, text: str) -> float:
    return mathematics.score(problem.reference["answer"], text)


SCORES: dict[str, Score] = {"reasoning_gym": gym.score, "math_verify": _score_mathematics}
"""The values of `reward.name`."""
LOADERS: dict[str, Callable[[DataSection], None]] = {
    "reasoning_gym": gym.load,
    "math_verify": lambda data: mathematics.load(),
}
"""Imports of each score, done before the first response is scored."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Score one response. A scorer can be pickled for a process pool; math_verify requires one."""

    reward: RewardSection
    """The name of the score and its rules."""
    data: DataSection
    """The task, for scores that depend on it."""

    def __call__(self, problem: Problem, text: str, stop_reason: StopReason) -> float:
        """Return the score in [0, 1] of any text. Raises what the score raises: the caller counts it."""
        if self.reward.require_stop and stop_reason != "stop":
            return 0.0
        answer = strip_thinking(text)
        judged = (answer.rpartition(self.reward.answer_marker)[2] if self.reward.answer_marker else answer).strip()
        if not judged:
            return 0.0
        if self.reward.name == "math_verify":
            check_main_thread()  # a fault of the program, not of the response
        score = float(SCORES[self.reward.name](self.data, problem, judged))
        if not math.isfinite(score):
            return 0.0
        return float(score >= 1.0) if self.reward.exact else min(max(score, 0.0), 1.0)


def make_scorer(recipe: Recipe) -> Scorer:
    """Make `scorer(problem, text, stop_reason) -> score` of a recipe. Call it in the process that scores."""
    LOADERS[recipe.reward.name](recipe.data)
    return Scorer(recipe.reward, recipe.data)
