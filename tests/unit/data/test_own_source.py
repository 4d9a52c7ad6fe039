"""A user's own source of problems: resumable by position, and wrong ones refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problems import open_problems
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from tests.places import ROOT

SUMS = f"{ROOT}/recipes/sources/sums.py:problems"
TOKENIZER = f"tokenizer: {{kind: sentencepiece, path: {ROOT}/recipes/tokenizers/arithmetic.model}}\n"


def open_stream(directory: Path, source: str = SUMS, **more: Any) -> PromptStream:
    recipe = load_recipe(ROOT / "recipes/tiny_moe.yaml")
    data = DataSection(source=source, **{"held_out": 4, **more})
    recipe = recipe.model_copy(update={"data": data}).with_arch(recipe.arch)
    return PromptStream(recipe, load_tokenizer(recipe.tokenizer, None))


def write(directory: Path, code: str) -> str:
    (directory / "mine.py").write_text(code)
    return f"{directory}/mine.py:problems"


FINITE = """
LINES = [{"prompt": f"Calculate {i} + 1.", "answer": str(i + 1)} for i in range(10)]

def problems(split, seed, start):
    yield from (LINES[:3] if split == "held_out" else LINES[2:])[start:]
"""


def test_the_stream_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    for source in (SUMS, write(tmp_path, FINITE)):
        stream, other = open_stream(tmp_path, source, held_out=3), open_stream(tmp_path, source, held_out=3)
        stream.next(23)
        other.restore(json.loads(json.dumps(stream.state())))
        assert other.next(9) == stream.next(9)


def test_a_source_that_ends_begins_again_and_its_held_out_lines_stay_out(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, write(tmp_path, FINITE), held_out=3)
    asked = [prompt.problem.question for prompt in stream.next(14)]
    assert asked == [f"Calculate {i} + 1." for i in range(3, 10)] * 2
    assert stream.skipped["held-out-question"] == 2
    assert [prompt.problem.question for prompt in stream.held_out(3)] == [f"Calculate {i} + 1." for i in range(3)]


def test_options_reach_the_function(tmp_path: Path) -> None:
    (prompt,) = open_stream(tmp_path, options={"digits": 1}).next(1)
    assert len(prompt.problem.question) == len("Calculate 1 + 1.")


WRONG = {
    "problems = 3": "is a int; name a function problems(split, seed, start)",
    "def problems(): yield {}": "cannot be called as problems(split, seed, start)",
    "async def problems(split, seed, start): yield {}": "is `async`",
    "def problems(split, seed, start): return None": "raised TypeError",
    "def problems(split, seed, start): return iter(())": "yields no line of the split 'train'",
    "def problems(split, seed, start): yield 3": "yielded a int",
    "def problems(split, seed, start): yield {1: 2}": "no object with texts as keys",
    "def problems(split, seed, start): yield {'question': 'a'}": "has no `prompt`",
    "def problems(split, seed, start): yield {'prompt': ''}": "has `prompt`=''",
    "def problems(split, seed, start): yield {'prompt': '\\ud800'}": "holds half of a surrogate pair",
    "def problems(split, seed, start): yield {'prompt': [{'role': 'assistant', 'content': 'a'}]}": "assistant's turn",
    "def problems(split, seed, start): raise OSError('no network')": "raised OSError: no network",
    "def problems(split, seed, start):\n    for i in range(9): yield {'prompt': str(i)}": "other lines of 'train'",
    "import random\ndef problems(split, seed, start):\n    while True: yield {'prompt': str(random.random())}":
        "make each line from its position alone",
}  # fmt: skip


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_source_is_refused_in_a_sentence(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path, code), "--hook", "source"]) == 2
    error = capsys.readouterr().err
    assert WRONG[code] in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("yield 3", "at position 0 of train yielded a int"),
        ("yield None", "raised TypeError: it yielded None at position 0 of train"),
        ("yield {'prompt': 'a'}", "at position 0 of train has no `answer`"),
        ("raise RuntimeError('gone\\nnow')", "raised RuntimeError: gone now at position 0 of train"),
        ("return; yield", "yields no problem of train"),
    ],
)
def test_what_fails_in_a_run_is_named_with_its_position(body: str, said: str, tmp_path: Path) -> None:
    source = write(tmp_path, f"def problems(split, seed, start):\n    {body}\n")
    with pytest.raises(RecipeError, match=f"data.source: .*mine.py:problems.* {said}") as caught:
        open_problems(DataSection(source=source, held_out=0)).draw("train", 0, 0)
    assert len(str(caught.value).splitlines()) == 1


def test_too_few_held_out_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="yields 3 different problems of the split held_out, and 4 are set"):
        open_stream(tmp_path, write(tmp_path, FINITE))
    with pytest.raises(ValueError, match="are for source=file"):
        DataSection(source=SUMS, path=tmp_path)
