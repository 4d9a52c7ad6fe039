"""PPO in every layout, in a gloo world of 4: values, advantages, loss and gradients are those of float64 formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.critic_worker import HEAD
from tests.parallel.layouts import Row
from tests.parallel.world import run_world

PPO = ["objective.preset=ppo", "objective.clip_low=null", "objective.clip_high=null", "objective.gae_discount=0.97",
       "objective.gae_decay=0.9", "objective.value_coefficient=0.5"]  # fmt: skip
DETACHED, WARMUP = "critic.trunk=detached", "critic.warmup_steps=1"


def case(layout: str, *more: str, double: bool = True) -> dict[str, Any]:
    return {"overrides": [*PPO, *Row(4, layout).overrides, *more], "double": double}


CASES = {
    "DP4": case(""),
    "TP4 EP2": case("TP4 EP2", WARMUP),
    "CP2 EP4": case("CP2 EP4"),
    "TP2 CP2 EP2 ETP2": case("TP2 CP2 EP2 ETP2"),
    "PP2 VPP2 EP2": case("PP2 VPP2 EP2", WARMUP),
    "PP2 CP2 recompute": case("PP2 CP2 recompute"),
    "CP4 dynamic EP2": case("CP4 dynamic EP2"),
    "TP2 CP2 dynamic EP2, detached": case("TP2 CP2 dynamic EP2", DETACHED),
    "TP2 PP2, detached": case("TP2 PP2", DETACHED),
    "EP2 overlap": case("EP2 overlap"),
    "TP2 CP2, single": case("TP2 CP2", double=False),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("critic")
    run_world("critic_worker.py", 4, CASES, directory)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_values_advantages_loss_and_gradients(name: str, results: Path) -> None:
    found = torch.load(results / f"{name}.pt", weights_only=False)
    bound = 1e-12 if CASES[name]["double"] else 1e-5
    worst = max(found["gradients"], key=lambda tensor: found["gradients"][tensor])
    print(f"{name}: values {found['values']:.1e}, advantages {found['advantages']:.1e}, loss {found['loss']:.1e}, "
          f"gradients {found['gradients'][worst]:.1e} ({worst}), head {found['gradients'][HEAD]:.1e}")  # fmt: skip
    assert found["values"] <= bound and found["advantages"] <= 10 * bound and found["loss"] <= bound
    assert found["gradients"][worst] <= 10 * bound, worst
    assert found["clipped"] > 0


@pytest.mark.parametrize("name", CASES)
def test_in_the_warm_up_only_the_head_learns(name: str, results: Path) -> None:
    found = torch.load(results / f"{name}.pt", weights_only=False)
    if WARMUP in CASES[name]["overrides"]:
        assert found["moved"] == {HEAD}
    else:
        assert HEAD in found["moved"] and len(found["moved"]) > 50


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_no_value_head(name: str, results: Path) -> None:
    assert torch.load(results / f"{name}.pt", weights_only=False)["exported"]


@pytest.mark.parametrize("name", CASES)
def test_fine_tuning_leaves_the_value_head_alone(name: str, results: Path) -> None:
    """Gradients that are reduced during the backward pass wait for every weight, this one too."""
    assert torch.load(results / f"{name}.pt", weights_only=False)["untouched"]
