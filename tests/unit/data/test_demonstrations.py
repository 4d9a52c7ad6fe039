"""Demonstrations: the worked style digit by digit, the share of it, and the training rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import ColdStartSection
from gspo_megatron.data.demonstrations import (
    build_demonstrations,
    demonstrate,
    find_writer,
    is_worked,
    write_column_addition,
)
from gspo_megatron.data.problems import problem_id
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from gspo_megatron.types import Problem
from tests.places import ROOT

SECTION = ColdStartSection(demonstrations="column_addition", worked_fraction=0.35, steps=1, batch_size=1, lr=1e-3)


def ask(question: str) -> Problem:
    return Problem(problem_id(question), question, {})


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Calculate 879 + 974.", "<|work|>9413,7715,8918=1853"),
        ("Calculate 41 + 265.", "<|work|>1506,4610,0203=306"),
        ("Calculate 1000 + 3.", "<|work|>0303,0000,0000,1001=1003"),
        ("Calculate 0 + 0.", "<|work|>0000=0"),
        ("Calculate 999 + 1.", "<|work|>9110,9010,9010=1000"),
    ],
)
def test_columns(question: str, answer: str) -> None:
    assert write_column_addition(ask(question), True) == answer
    assert write_column_addition(ask(question), False) == answer.rpartition("=")[2]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_working_and_result_agree(first: int, second: int) -> None:
    worked = write_column_addition(ask(f"Calculate {first} + {second}."), True)
    columns, _, total = worked.removeprefix("<|work|>").partition("=")
    groups = columns.split(",")
    digits = "".join(group[3] for group in reversed(groups))
    assert int(groups[-1][2] + digits) == int(total) == first + second


@pytest.mark.parametrize("question", ["Calculate 3 - 2.", "Calculate 1 + 2 + 3.", "Calculate -1 + 2.", "What is love?"])
def test_other_problems_are_refused(question: str) -> None:
    with pytest.raises(RecipeError, match="demonstration-does-not-fit"):
        write_column_addition(ask(question), True)


def test_unknown_writer_names_the_known() -> None:
    with pytest.raises(RecipeError, match="use one of column_addition"):
        find_writer("long_division")


def test_share_of_worked_answers_and_its_steadiness() -> None:
    problems = [ask(f"Calculate {i} + {i * 7}.") for i in range(2000)]
    share = sum(is_worked(problem, 0.35) for problem in problems) / len(problems)
    assert abs(share - 0.35) < 0.03
    assert all(is_worked(problem, 0.35) <= is_worked(problem, 0.6) for problem in problems)
    assert not any(is_worked(problem, 0.0) for problem in problems)
    assert all(is_worked(problem, 1.0) for problem in problems)


def test_rows_train_the_answer_and_its_stop_only() -> None:
    tokenizer = SentencePieceTokenizer(ROOT / "recipes/tokenizers/arithmetic.model")
    problems = [ask("Calculate 879 + 974."), ask("Calculate 41 + 265.")]
    for problem, row in zip(problems, build_demonstrations(problems, SECTION, tokenizer), strict=True):
        answer = row.token_ids[row.loss_mask]
        assert tokenizer.decode(answer.tolist()) == demonstrate(problem, SECTION)
        assert answer[-1] == tokenizer.stop_ids[0]
        assert row.token_ids[~row.loss_mask].tolist() == tokenizer.encode_prompt(problem.question)
        assert (row.ref.prompt_length, row.ref.answer_length) == ((~row.loss_mask).sum(), row.loss_mask.sum())


def test_a_tool_s_reply_is_not_trained_on() -> None:
    tokenizer = HuggingFaceTokenizer(ROOT / "recipes" / "tokenizers" / "agent")
    section = SECTION.model_copy(update={"demonstrations": "calculator_call", "worked_fraction": 1.0})
    (row,) = build_demonstrations([ask("Calculate 879 + 974.")], section, tokenizer)
    said = [tokenizer.decode(row.token_ids[row.loss_mask == trained].tolist()) for trained in (True, False)]
    assert said[0] == '<tool_call>\n{"name": "calculate", "arguments": {"expression": "879 + 974"}}\n</tool_call>1853'
    assert "<tool_response>\n1853\n</tool_response>" in said[1] and said[1].endswith("<|im_start|>assistant\n")
    arithmetic = SentencePieceTokenizer(ROOT / "recipes/tokenizers/arithmetic.model")
    with pytest.raises(RecipeError, match="demonstrations-without-template"):
        build_demonstrations([ask("Calculate 1 + 1.")], section, arithmetic)
