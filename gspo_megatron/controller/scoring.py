"""Scoring in processes of its own: a scorer that hangs or dies costs one reward, not the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future

from gspo_megatron.controller.process_pool import ProcessPool
from gspo_megatron.types import Problem, StopReason

Scorer = Callable[[Problem, str, StopReason], float]


def _make_number(make: Callable[[], Scorer]) -> Scorer:
    """A scorer that returns a number or raises, whatever the recipe's scorer returns."""
    scorer = make()
    return lambda problem, text, reason: float(scorer(problem, text, reason))


class ScoringPool(ProcessPool):
    """A few scoring processes; `submit` from any thread."""

    def __init__(self, make: Callable[[], Scorer], workers: int, limit: float) -> None:
        """
        Args:
            make: builds the scorer within each process; must be picklable.
            workers: scoring processes.
            limit: seconds that one response may take.
        """
        super().__init__(functools.partial(_make_number, make), workers, limit, "scorer")

    def submit(self, problem: Problem, text: str, reason: StopReason) -> Future[float | str]:
        """Score one response; the result is its reward, or a sentence about why it has none."""
        return self.ask(problem, text, reason)
