"""What a scoring process of the tests builds; without torch, so that it starts at once."""

from __future__ import annotations

from gspo_megatron.controller.scoring import Scorer
from gspo_megatron.types import Problem


def score_even(problem: Problem, text: str, stop_reason: str) -> float:
    """1 for an answer with an even number of tokens."""
    return float(len(text.split()) % 2 == 0)


def make_scorer() -> Scorer:
    return score_even
