"""A user's own reward in a recipe: what it gets, how its parts are weighed, clipped and counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.models import parse_recipe
from gspo_megatron.plan.run_plan import check
from gspo_megatron.rewards import AsyncScorer, Scorer, make_scorer
from gspo_megatron.rewards.reward_input import RewardInput
from gspo_megatron.types import Problem

BASE: dict[str, Any] = {
    "model": {
        "architecture": {
            "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 32, "moe_intermediate_size": 32,
            "num_experts": 2, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 64,
        }
    },
    "data": {"path": "unused"},
    "batch": {"prompts": 8, "answers": 3},
    "rollout": {"max_prompt_tokens": 20, "max_answer_tokens": 4},
}  # fmt: skip

PROBLEM = Problem("id", "What is 1 + 1?", {"answer": "2", "tests": ["a"]})
RESPONSE = RewardInput("<think>1</think>2", "2", (5, 6, 2), "stop")
CUT = RewardInput("2", "2", (5, 6, 2), "length")


def recipe(code: str, tmp_path: Path, **reward: Any) -> Any:
    file = tmp_path / "mine.py"
    file.write_text(code)
    return parse_recipe({**BASE, "reward": {"name": f"{file}:score", **reward}})


def test_it_gets_the_line_and_the_response(tmp_path: Path) -> None:
    code = "def score(problem, response): return float((problem['tests'], *response_of(response)) == WANTED)\n"
    code += "def response_of(r): return r.text, r.answer, r.token_ids, r.stop_reason\n"
    code += f"WANTED = (['a'], {RESPONSE.text!r}, '2', (5, 6, 2), 'stop')"
    scorer = make_scorer(recipe(code, tmp_path))
    assert isinstance(scorer, Scorer) and scorer(PROBLEM, RESPONSE).score == 1.0


@pytest.mark.parametrize(
    ("result", "rules", "score"),
    [
        ("0.25", {}, 0.25),
        ("0.25", {"exact": True}, 0.0),
        ("3", {}, 1.0),
        ("3", {"bounds": [-1, 5]}, 3.0),
        ("-3", {"bounds": [-1, 5]}, -1.0),
        ("5", {"bounds": [-1, 5], "exact": True}, 5.0),
        ("4", {"bounds": [-1, 5], "exact": True}, -1.0),
        ("True", {}, 1.0),
        ("{'right': 0.5, 'short': 0.25}", {}, 0.75),
        ("{'right': 0.5, 'short': 0.25}", {"weights": {"right": 1, "short": -0.4}}, 0.4),
        ("{'right': 0.5, '_tokens': 800}", {}, 0.5),
        ("{'right': 0.5, '_tokens': 800}", {"weights": {"right": 2}}, 1.0),
    ],
)
def test_parts_are_weighed_then_bounded(result: str, rules: dict[str, Any], score: float, tmp_path: Path) -> None:
    scorer = make_scorer(recipe(f"def score(problem, response): return {result}", tmp_path, **rules))
    assert isinstance(scorer, Scorer)
    assert scorer(PROBLEM, RESPONSE).score == pytest.approx(score)


def test_parts_are_kept_by_name_and_a_truncated_response_has_none(tmp_path: Path) -> None:
    code = "async def score(problem, response): return {'right': 1, '_tokens': 7}"
    scorer = make_scorer(recipe(code, tmp_path))
    assert isinstance(scorer, AsyncScorer)
    verdict, cut = asyncio.run(scorer(PROBLEM, RESPONSE)), asyncio.run(scorer(PROBLEM, CUT))
    assert (verdict.score, verdict.parts) == (1.0, (("right", 1.0), ("_tokens", 7.0)))
    assert (cut.score, cut.parts, cut.is_computed) == (0.0, (), False)


@pytest.mark.parametrize(
    ("result", "weights", "fault"),
    [
        ("{'right': 1}", {"right": 1, "short": 1}, "reward.weights names right, short, the reward returned right"),
        ("{'right': 1, 'short': 1}", {"right": 1}, "reward.weights names right, the reward returned right, short"),
        ("1.0", {"right": 1}, "reward.weights names right, the reward returned one number"),
        ("'1'", {}, "returned a str"),
        ("__import__('numpy').complex64(1)", {}, "returned a complex64"),
        ("__import__('numpy').str_('0.5')", {}, "returned a str_"),
        ("__import__('numpy').datetime64('2026-01-01')", {}, "returned a datetime64"),
        ("float('nan')", {}, "not finite"),
    ],
)
def test_a_wrong_result_raises(result: str, weights: dict[str, float], fault: str, tmp_path: Path) -> None:
    scorer = make_scorer(recipe(f"def score(problem, response): return {result}", tmp_path, weights=weights))
    assert isinstance(scorer, Scorer)
    with pytest.raises(ValueError, match=fault):
        scorer(PROBLEM, RESPONSE)


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        ({"name": "math_verfy"}, "did you mean math_verify?"),
        ({"name": "mine"}, "use one of math_verify, reasoning_gym, file.py:NAME or package.module:NAME"),
        ({"bounds": [1, 0]}, "no interval"),
        ({"weights": {"right": 1}}, "name=math_verify has none"),
        ({"name": "my.module:score", "weights": {"_tokens": 1}}, "only measured"),
    ],
)
def test_a_wrong_section_is_refused(reward: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault.replace("?", "\\?")):
        parse_recipe({**BASE, "reward": reward})


def test_a_reward_of_the_wrong_form_is_refused_before_the_run(tmp_path: Path) -> None:
    found = [f for f in check(recipe("score = 3", tmp_path)) if f.key == "reward.name"]
    assert [f.severity for f in found] == ["error"] and "is a int; name a function" in found[0].message


def test_a_reward_of_the_right_form_is_not(tmp_path: Path) -> None:
    assert not [f for f in check(recipe("def score(problem, response): ...", tmp_path)) if f.key == "reward.name"]


def test_what_becomes_of_a_score_is_said(tmp_path: Path) -> None:
    own = recipe("def score(problem, response): ...", tmp_path, weights={"right": 1, "short": 0.2}, require_stop=False)
    assert own.reward.describe() == "mine.py:score, 1 right + 0.2 short, clipped to [0, 1]"
    built_in = parse_recipe(BASE)
    assert built_in.reward.describe() == "math_verify, below 1 counts 0 (exact), truncated counts 0"
