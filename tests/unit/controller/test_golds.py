"""Golds as a controller starts: those that no response can match are said, and none but those end it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.controller.main import check_golds
from gspo_megatron.models import load_recipe
from tests.places import ROOT


def recipe(golds: list[Any], tmp_path: Path, name: str = "math_verify") -> Any:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": gold}) + "\n" for i, gold in enumerate(golds)))
    changed = ["data.source=jsonl", "data.task=null", "data.options={}", f"data.path={data}", "data.held_out=1"]
    return load_recipe(ROOT / "recipes/tiny_moe.yaml", [*changed, f"reward.name={name}", "cold_start=null"])


def test_golds_that_no_response_can_match_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_golds(recipe(["5", "}", 0.00001, "Paris"], tmp_path))
    assert "warning [golds-that-fail] data: 1 of 4 gold answers get 0" in caplog.text
    assert "info [golds-are-words] data: 1 of 4 gold answers are compared as words" in caplog.text


def test_none_but_such_golds_end_the_controller(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 of 2 gold answers get 0 when a response"):
        check_golds(recipe(["}", "a}b"], tmp_path))


def test_another_reward_reads_no_golds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_golds(recipe(["}", "}"], tmp_path, f"{ROOT}/recipes/rewards/closeness.py:score"))
    assert not caplog.text
