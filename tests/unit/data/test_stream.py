"""The prompt stream: resumable, endless, disjoint from the held-out set, and loud about what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.prompt_check import check_prompts
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from tests.checkpoints import write_checkpoint
from tests.places import ROOT

SHIPPED = f"tokenizer.path={ROOT / 'recipes/tokenizers/arithmetic.model'}"


def read_recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny_moe.yaml", [SHIPPED, *overrides])


def open_stream(*overrides: str) -> PromptStream:
    recipe = read_recipe(*overrides)
    return PromptStream(recipe, load_tokenizer(recipe.tokenizer, None))


@pytest.fixture
def jsonl(tmp_path: Path) -> tuple[str, ...]:
    """40 problems, 8 of them held out; prompts of 5 to 24 tokens."""
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}{'0' * (i // 2)} + 1", "answer": "1"}) + "\n" for i in range(40))
    )
    return (f"data={{source: jsonl, path: {path}, held_out: 8, task: null, options: null}}", "data.options={}")


def test_two_streams_of_one_seed_are_equal_and_of_two_seeds_are_not() -> None:
    first, again, other = open_stream(), open_stream(), open_stream("run.seed=1")
    prompts = first.next(32)
    assert prompts == again.next(32)
    assert [prompt.problem for prompt in prompts] != [prompt.problem for prompt in other.next(32)]
    assert first.held_out(64) == other.held_out(64)


def test_indices_go_on_and_never_meet_the_held_out_ones() -> None:
    stream = open_stream()
    indices = [prompt.index for prompt in stream.next(5) + stream.next(3)]
    assert indices == list(range(8))
    assert [prompt.index for prompt in stream.held_out(3)] == [-1, -2, -3]


def test_no_stage_ever_trains_on_a_held_out_question() -> None:
    stream = open_stream()
    held_out = {prompt.problem.question for prompt in stream.held_out(512)}
    assert len(held_out) == 512
    trained = {prompt.problem.question for prompt in stream.next(3000)}
    tuned = {problem.question for problem in stream.training_problems(3000, "cold_start")}
    assert not held_out & (trained | tuned)
    assert stream.skipped["held-out-question"] > 0


def test_restore_goes_on_exactly(jsonl: tuple[str, ...]) -> None:
    for overrides in ((), jsonl):
        stream, other = open_stream(*overrides), open_stream(*overrides)
        stream.next(21)
        state: dict[str, Any] = json.loads(json.dumps(stream.state()))
        other.restore(state)
        assert other.next(50) == stream.next(50)
        assert other.state() == stream.state()


def test_fine_tuning_problems_move_nothing() -> None:
    stream, untouched = open_stream(), open_stream()
    longer = stream.training_problems(20, "cold_start")
    assert stream.training_problems(8, "cold_start") == longer[:8]
    assert stream.training_problems(8, "control") != longer[:8]
    assert stream.next(4) == untouched.next(4)
    with pytest.raises(ValueError, match="reinforcement learning stream"):
        stream.training_problems(1, "train")


def test_a_state_of_other_data_is_refused() -> None:
    state = open_stream().state()
    with pytest.raises(RecipeError, match="resume-other-data"):
        open_stream("run.seed=1").restore(state)


LINES = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(20)]
CHANGES: dict[str, list[dict[str, str]]] = {
    "a line more": [*LINES, {"prompt": "90 + 1", "answer": "91"}],
    "a line less": LINES[:-1],
    "another answer": [{**LINES[0], "answer": "7"}, *LINES[1:]],
    "another field": [{**LINES[0], "source": "aime"}, *LINES[1:]],
    "a field that only an own reward reads": [{**LINES[0], "tests": "assert"}, *LINES[1:]],
}


def of_lines(file: Path, lines: Sequence[dict[str, str]], *overrides: str) -> PromptStream:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"data={{source: jsonl, path: {file}, held_out: 4, task: null, options: null}}"
    return open_stream(data, "data.options={}", *overrides)


@pytest.mark.parametrize("change", CHANGES)
def test_other_problems_under_the_same_name_are_refused(tmp_path: Path, change: str) -> None:
    stream = of_lines(tmp_path / "p.jsonl", LINES)
    stream.next(5)
    with pytest.raises(RecipeError, match=r"resume-other-data.*a line was added, removed or changed"):
        of_lines(tmp_path / "p.jsonl", CHANGES[change]).restore(stream.state())


def test_the_same_problems_elsewhere_go_on(tmp_path: Path) -> None:
    stream = of_lines(tmp_path / "p.jsonl", LINES)
    stream.next(5)
    moved = of_lines(tmp_path / "moved.jsonl", LINES[::-1])  # the order of the lines decides nothing
    moved.restore(stream.state())
    assert moved.next(30) == stream.next(30)


def test_a_state_of_an_earlier_version_goes_on_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = of_lines(tmp_path / "p.jsonl", LINES)
    stream.next(5)
    other = of_lines(tmp_path / "p.jsonl", LINES)
    other.restore({**stream.state(), "fingerprint": "0123456789abcdef"})
    assert other.next(5) == stream.next(5) and "of an earlier version" in caplog.text


def test_long_prompts_are_left_out_by_name_and_counted(
    jsonl: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_stream(*jsonl, "rollout.max_prompt_tokens=12", "evaluation.problems=1")
    prompts = stream.next(60)
    assert max(len(prompt.token_ids) for prompt in prompts) <= 12
    assert stream.skipped["prompt-too-long"] > 0
    assert "prompt-too-long: problem" in caplog.text
    assert len([record for record in caplog.records if "prompt-too-long" in record.message]) == 1


def test_a_stream_without_any_usable_prompt_stops(jsonl: tuple[str, ...]) -> None:
    stream = open_stream(*jsonl, "rollout.max_prompt_tokens=2")
    with pytest.raises(RecipeError, match="no-usable-prompt"):
        stream.next(1)
    with pytest.raises(RecipeError, match="held-out-too-few"):
        stream.held_out(1)


def test_a_run_whose_problems_changed_is_refused_before_it_starts(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"{one} + 1", "answer": str(one + 1)}) for one in range(40)]
    data.write_text("\n".join(lines))
    words = ("data.source=jsonl", "data.task=null", "data.options={}", f"data.path={data}", "data.held_out=8",
             "evaluation.problems=8", f"run.directory={tmp_path / 'run'}", "cold_start=null")  # fmt: skip
    recipe = read_recipe(*words)
    stream = PromptStream(recipe, load_tokenizer(recipe.tokenizer, None))
    stream.next(3)
    place = write_checkpoint(tmp_path / "run" / "checkpoints" / "step_000001")
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"controller": {"stream": stream.state()}}))
    assert not [one for one in check_prompts(recipe, runs_here=True) if one.severity == "error"]
    data.write_text("\n".join([*lines[:-1], lines[-1].replace("40", "41")]))
    found = [one.code for one in check_prompts(recipe, runs_here=True) if one.severity == "error"]
    assert found == ["resume-other-data"]
