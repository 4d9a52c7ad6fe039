"""What a scoring process of the tests builds; without torch, so that it starts at once."""

from __future__ import annotations

from collections.abc import Callable

from gspo_megatron.rewards import Verdict
from gspo_megatron.rewards.reward_input import RewardInput
from gspo_megatron.types import Problem


def score_even(problem: Problem, response: RewardInput) -> Verdict:
    """1 for an answer with an even number of tokens."""
    return Verdict(float(len(response.text.split()) % 2 == 0))


def make_scorer() -> Callable[[Problem, RewardInput], Verdict]:
    return score_even
