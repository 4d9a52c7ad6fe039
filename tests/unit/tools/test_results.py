"""The result file of the main job lies in the band that its recipe promises."""

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
