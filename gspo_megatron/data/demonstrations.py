"""Demonstrations for the cold start: a table of writers, and the training samples made from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

import numpy as np

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import ColdStartSection
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import Problem, Sample, SampleRef

Writer = Callable[[Problem, bool], str]
"""(problem, worked) -> the text of a right answer, with or without its working."""


def write_column_addition(problem: Problem, worked: bool) -> str:
    """Write `<|work|>9413,7715,8918=1853` for 879 + 974, or `1853` if not worked.

    One group per column from the right: digit, digit, carry out of the column, digit of the sum.

    Raises:
        RecipeError: the question is not a sum of two whole numbers.
    """
    numbers = re.findall(r"\d+", problem.question)
    operators = re.findall(r"[-+*/]", problem.question)
    if len(numbers) != 2 or operators != ["+"]:
        raise refuse(
            "demonstration-does-not-fit",
            "cold_start.demonstrations",
            f"column_addition writes sums of two whole numbers, not {problem.question!r}",
            "choose a task with sums, or another writer",
        )
    left, right = numbers
    total = str(int(left) + int(right))
    if not worked:
        return total
    width = max(len(left), len(right))
    columns, carry = [], 0
    for first, second in zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True):
        carry, digit = divmod(int(first) + int(second) + carry, 10)
        columns.append(f"{first}{second}{carry}{digit}")
    return f"<|work|>{','.join(columns)}={total}"


WRITERS: dict[str, Writer] = {"column_addition": write_column_addition}
"""The values of `cold_start.demonstrations`."""


def find_writer(name: str) -> Writer:
    """Return the writer of a name. Raises RecipeError with the known names."""
    if name not in WRITERS:
        raise refuse(
            "unknown-demonstrations",
            "cold_start.demonstrations",
            f"{name} is not a writer of demonstrations",
            f"use one of {', '.join(WRITERS)}",
        )
    return WRITERS[name]


def is_worked(problem: Problem, worked_fraction: float) -> bool:
    """Return whether a demonstration shows its working. The question's hash decides, for every seed and every pass."""
    digest = hashlib.sha256(f"style/{problem.question}".encode()).digest()
    return int.from_bytes(digest[:8]) < worked_fraction * 2**64


def demonstrate(problem: Problem, section: ColdStartSection) -> str:
    """Write the right answer to a problem in the style that its hash selects."""
    return find_writer(section.demonstrations)(problem, is_worked(problem, section.worked_fraction))


def build_demonstrations(problems: Iterable[Problem], section: ColdStartSection, tokenizer: Tokenizer) -> list[Sample]:
    """Make fine-tuning samples. The answer and its stop id are trained, the prompt is not."""
    rows = []
    for index, problem in enumerate(problems):
        prompt = tokenizer.encode_prompt(problem.question)
        answer = tokenizer.encode_response(demonstrate(problem, section))
        ids = np.array([*prompt, *answer], dtype=np.int32)
        ref = SampleRef("", index, 0, len(prompt), len(answer), reward=1.0, stop_reason="stop", segments=())
        rows.append(Sample(ids, np.arange(len(ids)) >= len(prompt), np.zeros(len(ids), dtype=np.float32), ref))
    return rows
