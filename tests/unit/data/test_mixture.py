"""Quality and diversity of the training stream: a window of pass rates, sources in shares, exact at every position."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problems import FileProblems
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe

COUNTS = {"algebra": 30, "geometry": 6, "puzzles": 3}
SHARES = {"algebra": 2, "geometry": 1, "puzzles": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """39 problems of three sources, with pass rates 0, 1/8 ... 1 in turn."""
    rows = [
        {"prompt": f"{place} + {offset}", "answer": "1", "source": name, "pass_rate": place % 9 / 8}
        for offset, (name, count) in enumerate(COUNTS.items())
        for place in range(count)
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def open_file(path: Path, **more: Any) -> FileProblems:
    return FileProblems(DataSection(path=path, held_out=0, **more))


def drawn(source: FileProblems, count: int, seed: int = 0) -> list[Any]:
    return [source.draw("train", seed, position) for position in range(count)]


def test_every_row_holds_the_shares_and_every_source_gives_all_it_has(path: Path) -> None:
    problems = drawn(open_file(path, mixture=SHARES), 60)
    for row in range(0, 60, 4):
        assert Counter(problem.source for problem in problems[row : row + 4]) == SHARES
    assert len({tuple(p.source for p in problems[row : row + 4]) for row in range(0, 60, 4)}) > 3, "rows are shuffled"
    algebra = [problem.id for problem in problems if problem.source == "algebra"]
    assert len(algebra) == len(set(algebra)) == 30, "one pass before any comes again"
    puzzles = [problem.id for problem in problems if problem.source == "puzzles"]
    assert all(len(set(puzzles[i : i + 3])) == 3 for i in range(0, 15, 3)) and len(puzzles) == 15


def test_a_draw_depends_on_its_position_only(path: Path) -> None:
    whole = drawn(open_file(path, mixture=SHARES), 80)
    source = open_file(path, mixture=dict(reversed(SHARES.items())))
    assert [source.draw("train", 0, position) for position in reversed(range(80))] == whole[::-1]
    assert drawn(source, 80, seed=1) != whole


def test_a_mixed_stream_resumes_exactly(path: Path) -> None:
    def open_stream() -> PromptStream:
        shares = json.dumps(SHARES).replace('"', "")
        data = f"data={{source: jsonl, path: {path}, held_out: 4, task: null, mixture: {shares}}}"
        recipe = load_recipe(Path("recipes/tiny_moe.yaml"), [data, "data.options={}", "data.pass_rate=[0.1, 0.9]"])
        return PromptStream(recipe, load_tokenizer(recipe.tokenizer, None))

    stream = open_stream()
    stream.next(7)
    state = json.loads(json.dumps(stream.state()))
    wanted = stream.next(30)
    other = open_stream()
    other.restore(state)
    assert other.next(30) == wanted
    assert {problem.source for problem in (prompt.problem for prompt in wanted)} == set(COUNTS)


def test_the_window_keeps_what_can_be_learned_and_leaves_the_held_out_alone(path: Path) -> None:
    source = open_file(path, pass_rate=(0.125, 0.875))
    assert {problem.pass_rate for problem in drawn(source, 200)} == {rate / 8 for rate in range(1, 8)}
    held_out = FileProblems(DataSection(path=path, held_out=12, pass_rate=(0.1, 0.9))).held_out
    assert held_out == FileProblems(DataSection(path=path, held_out=12)).held_out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mixture": {"algebra": 1, "geometry": 1}}, "3 problems have the source 'puzzles', which has no share"),
        (
            {"mixture": {**SHARES, "logic": 1}},
            "no problem is left of the source 'logic'; remove it; the file has",
        ),
        ({"pass_rate": (0.9, 0.95)}, "none of 39 problems lies within 0.9 to 0.95"),
        ({"mixture": SHARES, "pass_rate": (0.3, 1)}, "no problem is left of the source 'puzzles'"),
    ],
)
def test_what_draws_nothing_is_refused(path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        open_file(path, **more)
    assert said in str(caught.value)


def test_a_problem_without_a_rate_is_named(path: Path) -> None:
    path.write_text(path.read_text() + '{"prompt": "7 + 7", "answer": "14", "source": "algebra"}\n')
    with pytest.raises(RecipeError, match=r"'7 \+ 7' has no `pass_rate`"):
        open_file(path, pass_rate=(0, 1))
    path.write_text('{"prompt": "7 + 7", "answer": "14", "pass_rate": 7}\n')
    with pytest.raises(RecipeError, match="line 1 has `pass_rate`=7"):
        open_file(path)


@pytest.mark.parametrize(
    "section",
    [
        {"pass_rate": [0.9, 0.1]},
        {"pass_rate": [0, 1.5]},
        {"mixture": {"a": -1, "b": 2}},
        {"mixture": {"a": 0}},
        {"source": "reasoning_gym", "task": "basic_arithmetic", "pass_rate": [0, 1]},
    ],
)
def test_settings_that_make_no_sense_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pass_rate|mixture"):
        DataSection.model_validate({"path": "p.jsonl", **section})
