"""Demonstrations for the cold start: a table of writers, and the training samples made from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.task_sections import ColdStartSection
from gspo_megatron.data.conversation import encode_continuation, encode_turn
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from gspo_megatron.types import Problem, Sample, SampleRef

Writer = Callable[[Problem, bool], str | list[dict[str, Any]]]
"""(problem, worked) -> a right answer, with or without its working: a text, or the messages after the question."""


def write_column_addition(problem: Problem, worked: bool) -> str:
    """Write `<|work|>9413,7715,8918=1853` for 879 + 974, or `1853` if not worked.

    One group per column from the right: digit, digit, carry out of the column, digit of the sum.

    Raises:
        RecipeError: the question is not a sum of two whole numbers.
    """
    left, right = _read_sum(problem)
    total = str(int(left) + int(right))
    if not worked:
        return total
    width = max(len(left), len(right))
    columns, carry = [], 0
    for first, second in zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True):
        carry, digit = divmod(int(first) + int(second) + carry, 10)
        columns.append(f"{first}{second}{carry}{digit}")
    return f"<|work|>{','.join(columns)}={total}"


def write_calculator_call(problem: Problem, worked: bool) -> list[dict[str, Any]]:
    """Write a call of the tool `calculate`, its reply and the answer; only the answer if not worked.

    Raises:
        RecipeError: the question is not a sum of two whole numbers.
    """
    left, right = _read_sum(problem)
    answer = {"role": "assistant", "content": str(int(left) + int(right))}
    if not worked:
        return [answer]
    function = {"name": "calculate", "arguments": {"expression": f"{left} + {right}"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "content": answer["content"]}, answer]


def _read_sum(problem: Problem) -> list[str]:
    """The two numbers of a question. Raises RecipeError if it is no sum of two whole numbers."""
    numbers = re.findall(r"\d+", problem.question)
    if len(numbers) != 2 or re.findall(r"[-+*/]", problem.question) != ["+"]:
        raise refuse(
            "demonstration-does-not-fit",
            "cold_start.demonstrations",
            f"demonstrations are sums of two whole numbers, not {problem.question!r}",
            "choose a task with sums, or another writer",
        )
    return numbers


WRITERS: dict[str, Writer] = {"column_addition": write_column_addition, "calculator_call": write_calculator_call}
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


def demonstrate(problem: Problem, section: ColdStartSection) -> str | list[dict[str, Any]]:
    """Write the right answer to a problem in the style that its hash selects."""
    assert section.demonstrations is not None
    return find_writer(section.demonstrations)(problem, is_worked(problem, section.worked_fraction))


def build_demonstrations(
    problems: Iterable[Problem],
    section: ColdStartSection,
    tokenizer: Tokenizer,
    write: Callable[[Problem], Sequence[int]] | None = None,
) -> list[Sample]:
    """Make fine-tuning samples. The model's turns and their stop ids are trained, prompts and replies are not.

    Args:
        problems: what to demonstrate.
        section: `cold_start` of the recipe.
        tokenizer: of the recipe.
        write: gives the ids of a prompt; None = by the tokenizer, from the question alone.
    """
    rows = []
    for index, problem in enumerate(problems):
        prompt = write(problem) if write else tokenizer.encode_prompt(problem.question)
        written = demonstrate(problem, section)
        if isinstance(written, str):
            answer = tokenizer.encode_response(written)
            trained = [True] * len(answer)
        else:
            answer, trained = encode_messages(_with_template(tokenizer), written)
        ids = np.array([*prompt, *answer], dtype=np.int32)
        ref = SampleRef("", index, 0, len(prompt), len(answer), reward=1.0, stop_reason="stop", segments=())
        mask = np.array([False] * len(prompt) + trained)
        rows.append(Sample(ids, mask, np.zeros(len(ids), dtype=np.float32), ref))
    return rows


def encode_messages(tokenizer: HuggingFaceTokenizer, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Ids of the messages after a question, and which of them the model would sample."""
    ids, trained, replies = [], [], []
    for message in messages:
        if message["role"] != "assistant":
            replies.append(message)
            continue
        between = encode_continuation(tokenizer, replies, ids[-1]) if replies else []
        turn = encode_turn(tokenizer, message)
        ids += [*between, *turn]
        trained += [False] * len(between) + [True] * len(turn)
        replies = []
    return ids, trained


def _with_template(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise refuse(
            "demonstrations-without-template",
            "tokenizer.kind",
            "a sentencepiece tokenizer has no chat template, with which messages are written",
            "name a Hugging Face directory",
        )
    return tokenizer
