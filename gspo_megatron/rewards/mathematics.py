"""Mathematical equality with the reference answer, decided by math-verify."""

from __future__ import annotations

import logging
import threading

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.types import Problem

TAIL_CHARACTERS = 10_000
"""Only this many characters at the end of a response are searched: the time grows with their square."""
TIMEOUT_SECONDS = 3
"""Time limit for parsing one response, and for comparing it: `9^{9^{9}}` would never end."""


def load(data: DataSection) -> None:
    """Import math-verify before the first response is scored."""
    import math_verify  # noqa: F401


def score(data: DataSection, problem: Problem, text: str) -> float:
    """Return 1 if the last expression of the text (`\\boxed{}` first) equals the reference, else 0."""
    from math_verify import parse, verify

    # It logs the whole response whenever it fails to parse one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected = parse(f"\\boxed{{{problem.reference['answer']}}}", parsing_timeout=TIMEOUT_SECONDS)
    found = parse(text[-TAIL_CHARACTERS:], parsing_timeout=TIMEOUT_SECONDS)
    return float(verify(expected, found, timeout_seconds=TIMEOUT_SECONDS))


def check_thread() -> None:
    """Raise RuntimeError outside the main thread: math-verify's time limits are signals, which only it receives."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "reward.name=math_verify was called in a thread, where its time limits cannot work; score in a process pool"
        )
