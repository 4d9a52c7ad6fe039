"""Golds before a run: each is scored against itself; those that fail and those that are words are counted and shown."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.cli import main
from gspo_megatron.models import load_recipe
from gspo_megatron.rewards.gold_check import gold_findings
from gspo_megatron.types import Problem
from tests.places import ROOT
from tests.unit.rewards.fuzz_cases import CASES


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_recipe(ROOT / "recipes/tiny_moe.yaml", ["reward.name=math_verify", "reward.answer_marker=null"])


def problems(golds: list[str]) -> list[Problem]:
    return [Problem(str(place), f"q{place}", {"answer": gold}, gold) for place, gold in enumerate(golds)]


def test_golds_that_fail_are_counted_and_the_first_five_shown(recipe: Any) -> None:
    broken = ["}", "a}b", "\\frac{1", "\\boxed{}", "$$", "{", "}{"]
    (found,) = gold_findings(recipe, problems(["5", "72 dollars", *broken, "\\frac12"]))
    assert (found.code, found.severity) == ("golds-that-fail", "warning")
    assert found.message.startswith("7 of 10 gold answers get 0 when a response gives exactly them: '}', 'a}b', ")
    assert "'$$'" in found.message and "'{'" not in found.message


def test_golds_that_all_fail_are_an_error(recipe: Any) -> None:
    (found,) = gold_findings(recipe, problems(["}", "}"]))
    assert found.severity == "error" and "2 of 2" in found.message and found.message.count("'}'") == 1


def test_golds_of_words_are_shown(recipe: Any) -> None:
    (found,) = gold_findings(recipe, problems(["Paris", "5", "5 cm", "x+1", "(A)", "1 2 3"]))
    assert (found.code, found.severity) == ("golds-are-words", "info")
    assert found.message.startswith("2 of 6 gold answers are compared as words, letter by letter: 'Paris', '1 2 3'")


def test_golds_of_which_nothing_is_read_are_shown_with_the_words(recipe: Any) -> None:
    """Only the very same text would score 1."""
    (found,) = gold_findings(recipe, problems(["5</s>", "<b>5</b>", "5", "x+1", "(1, 2", "\\sqrt", "5</s>", "Paris"]))
    assert found.code == "golds-are-words" and found.message.startswith("6 of 8 gold answers are compared as words")
    assert all(repr(gold) in found.message for gold in ("(1, 2", "Paris", "5</s>", "<b>5</b>", "\\sqrt"))


@pytest.mark.parametrize(("more", "severity"), [([], "error"), (["5"], "warning")])
def test_golds_that_are_whole_solutions_are_said(recipe: Any, more: list[str], severity: str) -> None:
    """GSM8K as published: no response is that text."""
    (found,) = gold_findings(recipe, problems([f"First {n} + 3.\n#### {n + 3}" for n in range(4)] + more))
    assert (found.code, found.severity) == ("golds-are-solutions", severity)
    assert f"4 of {4 + len(more)} gold answers are whole solutions" in found.message and "prepare_prompts" in found.fix


def test_another_reward_has_no_golds_to_read() -> None:
    tiny = load_recipe(ROOT / "recipes/tiny_moe.yaml")
    assert tiny.reward.name != "math_verify" and not gold_findings(tiny, problems(["}"]))


PIECES = [
    "1", "0.5", "-3", "\\frac{1}{2}", "x", "^2", "\\sqrt{2}", "(", ")", "[", "]", ",", " ", "\\text{cm}", "\\{", "\\}",
    "\\pi", "%", "\\%", "$",
    "\u00b0", "e5", "\u2212", "km", "/", "=", "or", "\\\\", "&", "_2", "!", "{2}", ".", ":", "{", "}",
]  # fmt: skip


def is_balanced(gold: str) -> bool:
    depth = 0
    for brace in re.findall(r"[{}]", re.sub(r"\\.", "", gold)):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0 and not re.sub(r"\\\\", "", gold).endswith("\\")


def test_no_gold_stops_the_check_and_one_that_passes_scores_1(recipe: Any) -> None:
    for seed in range(CASES):
        draw = random.Random(f"golds/{seed}")
        gold = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 7)))
        if gold.strip():
            found = [finding for finding in gold_findings(recipe, problems([gold])) if finding.severity == "error"]
            assert not found or not is_balanced(gold) or not gold.strip(" .,:$"), (seed, gold, found[0].message)


def test_the_plan_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": gold, "answer": gold}) + "\n" for gold in ("5", "}", "Paris", "0.1")))
    changed = ["data.source=file", "data.task=null", "data.options={}", f"data.path={data}", "data.held_out=1"]
    changed += ["reward.name=math_verify", "cold_start=null", "evaluation.problems=1"]
    assert main(["plan", str(ROOT / "recipes/tiny_moe.yaml"), *changed]) == 0
    said = capsys.readouterr().out
    assert "warning [golds-that-fail] data: 1 of 4 gold answers get 0 when a response gives exactly them: '}'" in said
    assert "info [golds-are-words] data: 1 of 4" in said
