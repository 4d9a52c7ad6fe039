"""The committed result of `tools/bench_step_cost.py`: what a step costs in forward passes."""

from __future__ import annotations

import json

import pytest

from gspo_megatron.plan.estimate.passes import Passes
from tests.places import ROOT

LIVE, CLIPPED, UPDATES = 0.6, 0.15, 4


def test_the_closed_form() -> None:
    """a [4 + 3 (2 + 3 (1 - f))] / 4, and with the sampler's log-probs a [4 + 3 (1 + 3 (1 - f))] / 4."""
    ours = Passes(UPDATES, LIVE, CLIPPED, scores_first=False)
    assert ours.total == pytest.approx(2.6475)
    assert ours.training == pytest.approx(2.1975)
    assert Passes(UPDATES).total == 5
    assert Passes(UPDATES, recomputed=0.0).total == 4
    assert Passes(UPDATES, scores_later=False, scores_first=False).scoring == 0


def test_a_step_costs_what_its_signal_costs() -> None:
    result = json.loads((ROOT / "tools" / "results" / "bench_step_cost.json").read_text())
    counts, form = result["forward_equivalents"], result["closed_form"]
    for name in ("every_answer", "dropped", "dropped_sampler"):
        assert counts[name] == pytest.approx(form[name], rel=1e-6)
    for name, most in (("ours", 2.73), ("ours_sampler", 2.27)):
        assert form[name] <= counts[name] <= min(most, 1.03 * form[name])
    assert 0 < sum(result["apart"].values()) <= 0.05
    assert result["gradient_error"] <= 1e-12
    assert result["seconds"]["plain"] >= 1.25 * result["seconds"]["ours"]
