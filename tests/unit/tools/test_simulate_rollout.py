"""The simulator runs the pool and the dispatcher that the controller runs: what they need, it gives them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from gspo_megatron.models import load_recipe
from tools.rollout_simulation import Scenario, simulate, work_conserving_seconds
from tools.simulate_rollout import ENGINE, RECIPE
from tools.simulated_engine import Lengths

SMALL = Scenario(
    engines=2, model=replace(ENGINE, slots=16), lengths=Lengths(900, 1.0, 10_240), prompts=12, answers=8,
    train_seconds=20.0, update_seconds=1.0, overlaps=False, steps=6, warmup=2,
)  # fmt: skip


def test_no_policy_beats_the_bound_and_carrying_answers_comes_closest() -> None:
    recipe = load_recipe(Path(RECIPE), [])
    draws = [SMALL.lengths.of(*place) for place in product(range(256), range(8))]
    shares = {}
    for name, settings in {
        "synchronous": {}, "cut": {"over_provision": 0.25}, "partial": {"staleness": 1},
        "asynchronous": {"staleness": 2, "overlaps": True},
    }.items():  # fmt: skip
        scenario = replace(SMALL, **settings)
        found = simulate(scenario, recipe)
        shares[name] = work_conserving_seconds(scenario, found.tokens, draws) / found.seconds
        assert found.largest_staleness <= scenario.staleness
        assert found.wasted > 0 if name == "cut" else found.wasted == 0
    assert all(0 < share < 1.02 for share in shares.values())
    assert shares["partial"] > shares["synchronous"], shares
