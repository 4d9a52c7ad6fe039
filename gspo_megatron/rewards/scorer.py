"""The scorer of a recipe: a reward, and the rules of the `reward` section around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import DataSection, RewardSection
from gspo_megatron.rewards import gym, mathematics
from gspo_megatron.rewards.judge import Judge
from gspo_megatron.rewards.reward_contract import is_asynchronous
from gspo_megatron.rewards.reward_input import RewardInput, read_parts, weigh_parts
from gspo_megatron.rewards.time_limit import check_main_thread
from gspo_megatron.types import Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """The score of one response."""

    score: float
    """Within `reward.bounds`."""
    parts: tuple[tuple[str, float], ...] = ()
    """What a user's own reward returned by name, before weights."""
    is_computed: bool = True
    """False for a response that the rules leave out: no reward was asked."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of the `reward` section."""

    section: RewardSection

    def is_left_out(self, response: RewardInput) -> bool:
        """Whether a response gets the lowest score unseen: a truncated one, and for a built-in reward an empty one."""
        if self.section.require_stop and response.stop_reason != "stop":
            return True
        return not self.section.is_own and not response.answer

    @property
    def lowest(self) -> Verdict:
        """The verdict on a response that is not looked at."""
        return Verdict(self.section.bounds[0], is_computed=False)

    def judge(self, result: object) -> Verdict:
        """Turn what a reward returned into a score.

        Raises:
            ValueError: it is no number, its parts are not those of `reward.weights`, or none is rewarded.
        """
        parts, (low, high) = read_parts(result), self.section.bounds
        score = weigh_parts(parts, self.section.weights)
        if self.section.exact:
            score = high if score >= high else low
        return Verdict(min(max(score, low), high), tuple((name, value) for name, value in parts.items() if name))


@dataclass(frozen=True, slots=True)
class Scorer:
    """Score one response: `scorer(problem, response)`. Raises what the reward raises: the caller counts it."""

    rules: Rules
    reward: Callable[[Problem, RewardInput], Any]

    def __call__(self, problem: Problem, response: RewardInput) -> Verdict:
        """Return the verdict on a response."""
        if self.rules.is_left_out(response):
            return self.rules.lowest
        return self.rules.judge(self.reward(problem, response))


@dataclass(frozen=True, slots=True)
class AsyncScorer:
    """The same around a reward that is awaited."""

    rules: Rules
    reward: Callable[..., Any]
    """Takes problem and response, and the judge if there is one."""
    judge: Judge | None = None

    async def __call__(self, problem: Problem, response: RewardInput) -> Verdict:
        """Return the verdict on a response."""
        if self.rules.is_left_out(response):
            return self.rules.lowest
        if self.judge is None:
            return self.rules.judge(await self.reward(problem, response))
        async with self.judge.open() as inquiry:
            verdict = self.rules.judge(await self.reward(problem, response, judge=inquiry))
        return replace(verdict, parts=verdict.parts + inquiry.parts())


def load_reward(section: RewardSection) -> Callable[..., Any] | None:
    """Return the user's own reward of a recipe; None for a built-in one. Raises RecipeError."""
    return load_hook("reward", section.name) if section.is_own else None


def make_scorer(recipe: Recipe) -> Scorer | AsyncScorer:
    """Make the scorer of a recipe, with all that it imports. Call it in the process that scores."""
    section, rules = recipe.reward, Rules(recipe.reward)
    own = load_reward(section)
    if own is not None:
        judge = section.judge and Judge(section.judge)
        if is_asynchronous(own):
            return AsyncScorer(rules, lambda problem, response, **more: own(problem.line, response, **more), judge)
        return Scorer(rules, lambda problem, response: own(problem.line, response))
    return Scorer(rules, BUILT_IN[section.name](recipe.data))


def _load_mathematics(data: DataSection) -> Callable[[Problem, RewardInput], float]:
    check_main_thread()
    mathematics.load()

    def score(problem: Problem, response: RewardInput) -> float:
        if problem.answer is None:
            raise ValueError(f"problem {problem.id} has no answer that is a text")
        return mathematics.score(problem.answer, response.answer)

    return score


def _load_gym(data: DataSection) -> Callable[[Problem, RewardInput], float]:
    gym.load(data)
    return lambda problem, response: gym.score(data, problem, response.answer)


BUILT_IN: dict[str, Callable[[DataSection], Callable[[Problem, RewardInput], float]]] = {
    "math_verify": _load_mathematics,
    "reasoning_gym": _load_gym,
}
"""The built-in values of `reward.name`: each imports what it needs and returns `reward(problem, response)`."""
