"""Scores: right, wrong, padded, garbage and huge answers; nothing a model writes may stop the run."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.task_sections import DataSection, RewardSection
from gspo_megatron.rewards import SCORES, Scorer
from gspo_megatron.types import Problem

GYM = DataSection(source="reasoning_gym", task="basic_arithmetic")
PROBLEM = Problem("id", "Calculate 456 + 456.", {"question": "Calculate 456 + 456.", "answer": "912", "metadata": {}})


def gym(**rules: Any) -> Scorer:
    return Scorer(RewardSection(name="reasoning_gym", **rules), GYM)


def mathematics(**rules: Any) -> Scorer:
    return Scorer(RewardSection(name="math_verify", **rules), DataSection(path=Path("unused.jsonl")))


def test_every_name_of_the_schema_has_a_score() -> None:
    assert set(SCORES) == set(get_args(RewardSection.model_fields["name"].annotation))


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
    assert gym(answer_marker="=")(PROBLEM, text, "stop") == score


def test_gym_part_marks_only_when_asked_for() -> None:
    assert gym(exact=False)(PROBLEM, "9912", "stop") == 0.75
    assert gym()(PROBLEM, "9912", "stop") == 0.0


def test_a_cut_answer_scores_nothing_unless_allowed() -> None:
    assert gym()(PROBLEM, "912", "length") == 0.0
    assert gym()(PROBLEM, "912", "abort") == 0.0
    assert gym(require_stop=False)(PROBLEM, "912", "length") == 1.0


MATH = Problem("id", "Which share?", {"answer": "\\frac{1}{2}"})


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
    assert mathematics()(MATH, text, "stop") == score


def test_mathematics_reads_plain_references() -> None:
    assert mathematics()(PROBLEM, "The answer is 912.", "stop") == 1.0
    assert mathematics()(PROBLEM, "The answer is 9912.", "stop") == 0.0


def test_mathematics_in_a_thread_says_so_instead_of_scoring_nothing() -> None:
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            mathematics()(MATH, "\\boxed{0.5}", "stop")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "process pool" in str(raised[0])


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_no_text_stops_a_scorer(text: str) -> None:
    for scorer, problem in ((gym(exact=False), PROBLEM), (gym(answer_marker="="), PROBLEM), (mathematics(), MATH)):
        assert 0.0 <= scorer(problem, text, "stop") <= 1.0


def test_a_scorer_travels_to_another_process() -> None:
    scorer = pickle.loads(pickle.dumps(gym(answer_marker="=")))
    assert scorer(*pickle.loads(pickle.dumps((PROBLEM, "1=912", "stop")))) == 1.0


def test_a_failing_score_raises() -> None:
    with pytest.raises(KeyError):
        gym()(Problem("broken", "?", {}), "912", "stop")
