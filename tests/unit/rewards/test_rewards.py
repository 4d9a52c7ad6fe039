"""Scores: right, wrong, padded, garbage and huge answers; nothing a model writes may stop the run."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.task_sections import BUILT_IN_REWARDS, DataSection, RewardSection
from gspo_megatron.rewards.reward_input import make_input
from gspo_megatron.rewards.scorer import BUILT_IN, Rules, Scorer
from gspo_megatron.types import Problem, StopReason

GYM = DataSection(source="reasoning_gym", task="basic_arithmetic")
FILE = DataSection(path=Path("unused.jsonl"))
ENTRY: dict[str, Any] = {"question": "Calculate 456 + 456.", "answer": "912", "metadata": {}}
PROBLEM = Problem("id", ENTRY["question"], ENTRY, "912")


def score(name: str, problem: Problem, text: str, reason: StopReason = "stop", **rules: Any) -> float:
    section = RewardSection(name=name, **rules)
    scorer = Scorer(Rules(section), BUILT_IN[name](GYM if name == "reasoning_gym" else FILE))
    return scorer(problem, make_input(text, (), reason, section.answer_marker, "</think>", False)).score


gym, mathematics = functools.partial(score, "reasoning_gym"), functools.partial(score, "math_verify")


def test_every_name_of_the_schema_has_a_score() -> None:
    assert set(BUILT_IN) == set(BUILT_IN_REWARDS)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("912", 1.0),
        ("<|work|>6612,5511,4419=912", 1.0),
        ("1=2=912", 1.0),
        (" 912\n", 1.0),
        ("9912", 0.0),
        ("0912", 0.0),
        ("912=", 0.0),
        ("912=913", 0.0),
        ("", 0.0),
        ("=", 0.0),
        ("9" * 1_000_000 + "912", 0.0),
        ("\x00\ud800", 0.0),
    ],
)
def test_gym_exact(text: str, score: float) -> None:
    assert gym(PROBLEM, text, answer_marker="=") == score


def test_gym_part_marks_only_when_asked_for() -> None:
    assert gym(PROBLEM, "9912", exact=False) == 0.75
    assert gym(PROBLEM, "9912") == 0.0


def test_a_cut_answer_scores_nothing_unless_allowed() -> None:
    assert gym(PROBLEM, "912", "length") == 0.0
    assert gym(PROBLEM, "912", "abort") == 0.0
    assert gym(PROBLEM, "912", "length", require_stop=False) == 1.0


MATH = Problem("id", "Which share?", {}, "\\frac{1}{2}")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("So it is $\\frac{1}{2}$.", 1.0),
        ("Thus \\boxed{0.5}", 1.0),
        ("Thus \\boxed{2/4}", 1.0),
        ("Thus \\boxed{\\frac{1}{3}}", 0.0),
        ("I do not know.", 0.0),
        ("x " * 200_000 + "\\boxed{0.5}", 1.0),
        ("(" * 5000, 0.0),
        ("\\boxed{" * 2000, 0.0),
        ("\x00\ud800", 0.0),
    ],
)
def test_mathematics(text: str, score: float) -> None:
    assert mathematics(MATH, text) == score


def test_mathematics_reads_plain_references() -> None:
    assert mathematics(PROBLEM, "The answer is 912.") == 1.0
    assert mathematics(PROBLEM, "The answer is 9912.") == 0.0


def test_mathematics_in_a_thread_says_so_instead_of_scoring_nothing() -> None:
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            mathematics(MATH, "\\boxed{0.5}")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "process pool" in str(raised[0])


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_no_text_stops_a_scorer(text: str) -> None:
    assert 0.0 <= gym(PROBLEM, text, exact=False) <= 1.0
    assert gym(PROBLEM, text, answer_marker="=") in (0.0, 1.0)
    assert mathematics(MATH, text) in (0.0, 1.0)


def test_a_failing_score_raises() -> None:
    with pytest.raises(KeyError):
        gym(Problem("broken", "?", {}), "912")
