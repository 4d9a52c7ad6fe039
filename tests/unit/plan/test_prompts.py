"""tools/prepare_prompts.py on rows shaped like the published sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problem_lines import read_problems
from tools.prepare_prompts import INSTRUCTIONS, WRAPPINGS, BadFile, convert

BEFORE, AFTER = WRAPPINGS[0]
DAPO = {"prompt": [{"role": "user", "content": f"{BEFORE}What is 1+1?{AFTER}"}], "reward_model": {"ground_truth": "2"}}
AIME = {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "long", "Answer": 204}


def test_the_published_shapes_are_understood() -> None:
    problems, dropped = convert([DAPO, DAPO])
    assert problems == {f"{BEFORE}What is 1+1?{AFTER}".strip(): {"answer": "2"}} and dropped == {"repeated": 1}
    problems, _ = convert([AIME], instruction="boxed")
    assert problems == {"Find x." + INSTRUCTIONS["boxed"]: {"answer": "204"}}
    problems, _ = convert([DAPO], instruction="boxed")
    assert list(problems) == ["What is 1+1?" + INSTRUCTIONS["boxed"]]


def test_a_problem_with_two_answers_is_dropped_for_good() -> None:
    rows = [{"question": "q", "answer": a} for a in ("1", "2", "1")] + [{"question": "p", "answer": "3"}]
    problems, dropped = convert(rows)
    assert problems == {"p": {"answer": "3"}} and dropped == {"with two answers": 3}


def test_pass_rates_come_in_three_shapes() -> None:
    values: list[object] = [0.875, "7/8", [1, 0.5, True, 0], "0", 1.5, "1/0", None, [], "x"]
    rows = [{"question": str(i), "answer": "1", "rate": value} for i, value in enumerate(values)]
    problems, dropped = convert(rows, rate_key="rate")
    assert [fields["pass_rate"] for fields in problems.values()] == [0.875, 0.875, 0.5, 0.0]
    assert dropped == {"without pass rate": 5}


@pytest.mark.parametrize("rows", [[], [{"text": "x"}], [{"question": "", "answer": None}]])
def test_what_cannot_be_turned_is_said(rows: list[dict[str, str]]) -> None:
    with pytest.raises(BadFile):
        convert(rows)


def test_the_script_writes_what_a_recipe_reads(tmp_path: Path) -> None:
    source, target = tmp_path / "aime.json", tmp_path / "data" / "aime.jsonl"
    source.write_text(json.dumps([AIME, {**AIME, "Problem": "Find y.", "Answer": 25.0}]))
    done = subprocess.run(
        [sys.executable, "tools/prepare_prompts.py", str(source), str(target), "--source", "aime"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 problems of 2 rows" in done.stdout
    assert [problem.answer for problem in read_problems(DataSection(path=target)).values()] == ["204", "25"]
    assert {problem.source for problem in read_problems(DataSection(path=target)).values()} == {"aime"}
    done = subprocess.run(
        [sys.executable, "tools/prepare_prompts.py", str(tmp_path / "none"), str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
