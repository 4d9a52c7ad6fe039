"""`gspo data`: counts, lengths, what is left out and why, prompts token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.commands.prompt_report import quantile
from tests.places import ROOT
from tests.tokenizer_directory import save_tokenizer

TINY = ROOT / "recipes/tiny_moe.yaml"


def words(path: Path, *more: str) -> list[str]:
    return ["data", str(TINY), f"data={{source: jsonl, path: {path}, task: null, held_out: 4}}", "cold_start=null",
            "reward.name=math_verify", "evaluation.problems=null", *more]  # fmt: skip


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    lines = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(10)]
    lines += [lines[0], {"prompt": "1" * 60, "answer": "1"}, {"prompt": "\u0447", "answer": "1"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_counts_lengths_and_what_is_left_out(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = problems.with_name("h.jsonl")
    held.write_text('{"prompt": " 3 +  1", "answer": "4"}\n')
    assert main(words(problems, f"data.held_out_path={held}")) == 0
    said = capsys.readouterr().out
    counts = "13 lines, 1 repeated, 1 held out, 1 others that ask a held-out question, 11 to train on"
    assert f"problems   {problems}: {counts}" in said
    assert "prompts    9 of 11 positions of the stream are usable" in said
    assert "tokens     least 5, 10% 5, median 5, 90% 5, 99% 5, most 5; rollout.max_prompt_tokens=32" in said
    assert "left out   1 prompt-too-long: the first has 62 tokens" in said
    assert "left out   1 prompt-unreadable: the first '\u0447' has characters that" in said
    assert "held out   1 are evaluated" in said
    assert said.count("prompt 1   5 tokens, problem ") == 1 and "\n  [<q>][" in said and "[<a>]\n" in said


def test_generated_and_own_problems_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        TINY.read_text().split("data:")[0].replace("tokenizers/", f"{ROOT}/recipes/tokenizers/")
        + f"data: {{source: '{ROOT}/recipes/sources/sums.py:problems', held_out: 8}}\n"
        "rollout: {max_answer_tokens: 28, max_prompt_tokens: 32}\n"
    )  # fmt: skip
    assert main(["data", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "sums.py:problems: 8 held out" in said and "prompts    2000 of 2000 positions" in said
    assert "prompt 3   11 tokens" in said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [("data.path=/nowhere", "data.path: /nowhere does not exist here"),
     ("rollout.max_prompt_tokens=2", "no-usable-prompt|held-out-too-few"),
     ("evaluation.problems=5", "5 problems are set, but data.held_out=4"),
     ("tokenizer.path=/nowhere", "tokenizer.path: /nowhere does not exist here")],
)  # fmt: skip
def test_what_a_run_would_be_refused_for_is_refused(
    override: str, sentence: str, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(problems, override)) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in sentence.split("|"))


def test_a_hugging_face_prompt_is_shown_with_its_boundaries(problems: Path) -> None:
    """In a process of its own: the command loads the library without torch."""
    directory = save_tokenizer(
        problems.parent / "tokenizer", "{% for m in messages %}<pad>{{ m.content }}\n{% endfor %}"
    )
    more = ["tokenizer.kind=huggingface", f"tokenizer.path={directory}", "model.architecture.vocab_size=512"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron.cli", *words(problems, *more)], capture_output=True, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[<pad>][" in done.stdout and "[\\n]" in done.stdout
    assert "1 prompt-too-long" in done.stdout


def test_quantiles_are_values_that_occur() -> None:
    assert [quantile([1, 2, 3, 4], part) for part in (0.0, 0.1, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
