"""The result files of the main job and of the agent hold what their recipes promise."""

from __future__ import annotations

import json
import re

from tests.places import ROOT

BAND = (0.85, 0.98)
"""Held-out accuracy that `make train` ends with; seed 0 of `recipes/tiny_moe.yaml`."""


def test_the_main_job_ends_in_its_band() -> None:
    result = json.loads((ROOT / "recipes" / "results" / "tiny_moe.json").read_text())["seed 0"]
    before, after = result["held_out_accuracy"]
    assert before < 0.45
    assert BAND[0] <= after <= BAND[1]
    assert result["steps"] == 30
    assert result["canary_largest"] < 1e-4


def test_the_recipe_writes_the_band_down() -> None:
    text = (ROOT / "recipes" / "tiny_moe.yaml").read_text()
    found = re.search(r"held-out greedy accuracy \S+ -> (0\.\d+)-(0\.\d+)", text)
    assert found is not None
    assert (float(found[1]), float(found[2])) == BAND


def test_the_agent_learns_its_tool_in_every_seed() -> None:
    """`make train-agent`: held-out accuracy rises by 0.2 at least, and no sampled token was tokenized again."""
    results = json.loads((ROOT / "tools" / "results" / "train_agent.json").read_text())
    assert sorted(results) == ["seed 0", "seed 1", "seed 2"]
    for result in results.values():
        before, after = result["held_out_accuracy"]
        assert after - before >= 0.2 and result["steps"] >= 30
        assert result["tokens_retokenized"] == 0 and result["unscored"] == 0
        assert result["mismatch_abs_max"] < 1e-4
