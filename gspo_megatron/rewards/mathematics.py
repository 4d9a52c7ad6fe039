"""Mathematical equality with the reference answer, by math-verify."""

from __future__ import annotations

import logging
import threading

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.types import Problem

TAIL_CHARACTERS = 10_000
"""Only the end of an answer is searched: the result stands there, and the time to search grows with the square."""
TIMEOUT_SECONDS = 3
"""For reading one answer and for comparing it: `9^{9^{9}}` would take for ever."""


def load(data: DataSection) -> None:
    """Import what `score` needs, so that no answer's time pays for it."""
    import math_verify  # noqa: F401


def score(data: DataSection, problem: Problem, text: str) -> float:
    """1 when the last expression of the text (`\\boxed{}` first) equals the reference, else 0."""
    from math_verify import parse, verify

    # It quotes the whole answer whenever it gives up on one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected = parse(f"\\boxed{{{problem.reference['answer']}}}", parsing_timeout=TIMEOUT_SECONDS)
    found = parse(text[-TAIL_CHARACTERS:], parsing_timeout=TIMEOUT_SECONDS)
    return float(verify(expected, found, timeout_seconds=TIMEOUT_SECONDS))


def check_thread() -> None:
    """Raise where math-verify cannot work: its time limits are signals, which only a main thread receives."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "reward.name=math_verify was asked in a thread; score in a process pool, whose workers have main threads"
        )
