"""Problem sources: the errors of a broken file, and the split into training and held-out questions."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problem_lines import read_problems
from gspo_megatron.data.problems import FileProblems, ProblemSource, open_problems
from gspo_megatron.types import Problem

ADDITION = {
    "operators": ["+"],
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "allow_parentheses": False,
    "allow_negation": False,
}


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def write_problems(path: Path, count: int) -> Path:
    return write_lines(path, [json.dumps({"prompt": f"{i} + 1", "answer": i + 1}) for i in range(count)])


def open_file(path: Path, held_out: int, **more: Any) -> FileProblems:
    return FileProblems(DataSection(path=path, held_out=held_out, **more))


def read_file(path: Path, needs_answer: bool = True, **more: Any) -> dict[str, Problem]:
    return read_problems(DataSection(path=path, **more), needs_answer)


GOOD = '{"prompt": "1 + 1", "answer": "2"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "2 + 2"}', "line 3 has no `answer`; add `answer`; it has prompt"),
        ('{"answer": "4"}', "line 3 has no `prompt`"),
        ('{"prompt": "2 + 2", "answer": "4"', "line 3 is not JSON"),
        ('["2 + 2", "4"]', "line 3 is no object"),
        ('{"prompt": "", "answer": "4"}', "line 3 has `prompt`=''"),
        ('{"prompt": "2 + 2", "answer": null}', "line 3 has `answer`=None"),
        ('{"prompt": "2 + 2", "answer": true}', "line 3 has `answer`=True"),
        ('{"prompt": "1 + 1", "answer": "3"}', "line 3 repeats a prompt with another answer: '2' and '3'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", [GOOD, "", line])
    with pytest.raises(RecipeError) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(RecipeError, match="line 2 is not UTF-8"):
        read_file(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere.jsonl cannot be read \(No such file"):
        read_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(RecipeError, match="prompt-file-empty"):
        read_file(write_lines(tmp_path / "empty.jsonl", ["", ""]))


def test_unicode_line_separators_do_not_break_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [json.dumps({"prompt": "a\u2028b", "answer": "c"}, ensure_ascii=False)])
    assert [problem.question for problem in read_file(path).values()] == ["a\u2028b"]


def draw_id(source: ProblemSource, index: int) -> str:
    problem = source.draw("train", 0, index)
    assert problem is not None
    return problem.id


def test_jsonl_split_ignores_order_of_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{i} + 1", "answer": i + 1}) for i in range(50)]
    one = open_file(write_lines(tmp_path / "a", lines), 10)
    other = open_file(write_lines(tmp_path / "b", lines[::-1]), 10)
    assert one.held_out == other.held_out
    drawn = {draw_id(one, i) for i in range(40)}
    assert len(drawn) == 40
    assert not drawn & {problem.id for problem in one.held_out}


def test_jsonl_passes_differ_and_are_complete(tmp_path: Path) -> None:
    source = open_file(write_problems(tmp_path / "p", 30), 0)
    first, second = ([draw_id(source, start + i) for i in range(30)] for start in (0, 30))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_held_out_file_is_excluded_whole(tmp_path: Path) -> None:
    source = open_file(write_problems(tmp_path / "p", 30), 4, held_out_path=write_problems(tmp_path / "h", 12))
    assert len(source.held_out) == 12
    assert source.span == 18
    with pytest.raises(RecipeError, match=r"data.held_out_path: all 30 questions"):
        open_file(write_problems(tmp_path / "p", 30), 4, held_out_path=write_problems(tmp_path / "h", 30))


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.held_out: all 5 questions"):
        open_file(write_problems(tmp_path / "p", 5), 8)


def test_gym_training_never_meets_a_held_out_question() -> None:
    """One digit: 121 questions, 60 of them held out, so that most streams run into them."""
    source = open_problems(DataSection(source="reasoning_gym", task="basic_arithmetic", options=ADDITION, held_out=60))
    held_out = {problem.question for problem in source.held_out}
    assert len(held_out) == 60
    drawn = [source.draw("train", seed, i) for seed in (0, 1) for i in range(600)]
    assert any(problem is None for problem in drawn)
    assert not held_out & {problem.question for problem in drawn if problem}


def test_gym_stream_goes_on_after_a_block() -> None:
    source = open_problems(DataSection(source="reasoning_gym", task="basic_arithmetic", options={}, held_out=0))
    assert len({draw_id(source, i) for i in range(990, 1010)}) == 20


def test_gym_seeds_and_stages_differ_and_repeat() -> None:
    source = open_problems(DataSection(source="reasoning_gym", task="basic_arithmetic", options={}, held_out=4))
    streams = {
        (stage, seed): [source.draw(stage, seed, i) for i in range(20)]
        for stage in ("train", "cold_start")
        for seed in (0, 1)
    }
    assert len({tuple(problem.id for problem in stream if problem) for stream in streams.values()}) == 4
    assert streams["train", 0] == [source.draw("train", 0, i) for i in range(20)]


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("basic_arithmetik", {}, "basic_arithmetik"),
        ("basic_arithmetic", {"max_digit": 3}, "max_digit"),
        ("basic_arithmetic", {"seed": 3}, "seed"),
        ("basic_arithmetic", {"min_terms": 0}, "min_terms must be positive"),
    ],
)
def test_gym_names_what_it_does_not_know(task: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(RecipeError, match=r"data.task") as caught:
        open_problems(DataSection(source="reasoning_gym", task=task, options=options))
    assert said in str(caught.value)


def test_gym_that_has_too_few_questions_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data.held_out: basic_arithmetic has only about 1\d\d questions"):
        open_problems(DataSection(source="reasoning_gym", task="basic_arithmetic", options=ADDITION, held_out=500))


def test_a_problem_carries_its_whole_line(tmp_path: Path) -> None:
    text = '{"prompt": "p", "answer": 0.00001, "Tests": ["a", {"n": 1}], "ratio": 1e22}'
    (problem,) = read_file(write_lines(tmp_path / "p.jsonl", [text])).values()
    assert problem.answer == "0.00001"
    assert problem.line == json.loads(text) and str(problem.line["ratio"]) == "1e22"
    assert (
        pickle.loads(pickle.dumps(problem)).line == problem.line and str(copy.deepcopy(problem.line["ratio"])) == "1e22"
    )


def test_only_a_reward_of_one_s_own_goes_without_answers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ['{"prompt": "p", "tests": [1]}'])
    (problem,) = read_file(path, needs_answer=False).values()
    assert problem.answer is None and problem.line["tests"] == [1]
    with pytest.raises(RecipeError, match="has no `answer`"):
        read_file(path)


@pytest.mark.parametrize("golds", [(["1"], ["2"]), ({"v": 1}, {"v": 2}), (True, False), ("1", None)])
def test_two_golds_of_one_prompt_are_refused_whatever_they_are(tmp_path: Path, golds: tuple[object, object]) -> None:
    lines = [json.dumps({"prompt": "p", "answer": gold}) for gold in golds]
    with pytest.raises(RecipeError, match="line 2 repeats a prompt with another answer"):
        read_file(write_lines(tmp_path / "p.jsonl", lines), needs_answer=False)


def test_a_reward_of_one_s_own_gets_every_line_that_differs(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "p", "answer": "1", "tests": tests}) for tests in ("a", "b", "a")]
    path = write_lines(tmp_path / "p.jsonl", lines)
    assert [problem.line["tests"] for problem in read_file(path, needs_answer=False).values()] == ["a", "b"]
    assert len(read_file(path)) == 1, "a built-in reward sees the answer only"
    assert list(read_file(path, needs_answer=False)) == list(read_file(path, needs_answer=False)), "stable ids"


@pytest.mark.parametrize("number", ["1e400", "-1e999", "NaN", "Infinity", "9" * 5000])
def test_a_number_that_is_none_is_refused_with_its_line(tmp_path: Path, number: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", [GOOD, f'{{"prompt": "p", "answer": {number}}}'])
    with pytest.raises(RecipeError, match="line 2 holds a number that cannot be read"):
        read_file(path)
