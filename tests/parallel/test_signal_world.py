"""Passes whose gradient is 0 are left out; loss, gradients, weights and counts stay, in a gloo world of 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.signal_worker import REWARDS
from tests.parallel.world import run_world

WORLD = 4
TRAINER = {
    "TP": "tensor_parallel", "PP": "pipeline_parallel", "VPP": "virtual_pipeline", "CP": "context_parallel",
    "EP": "expert_parallel", "ETP": "expert_tensor_parallel",
}  # fmt: skip
LAYOUTS = ["TP2", "TP2 EP2", "EP2", "EP4", "CP2", "CP2 EP4", "PP2", "PP2 VPP2", "PP2 VPP2 EP2", "TP2 PP2 EP2",
           "TP2 CP2 EP2", "PP2 CP2"]  # fmt: skip


def overrides_of(layout: str) -> list[str]:
    return [f"trainer.{TRAINER[word.rstrip('0123456789')]}={word.lstrip('EPTCV')}" for word in layout.split()]


GRPO_BAND = ("objective.clip_low=0.2", "objective.clip_high=0.27")


def case(layout: str, rewards: str, *more: str) -> dict[str, Any]:
    return {"overrides": [*overrides_of(layout), *more], "rewards": rewards, "double": True}


def cases() -> dict[str, dict[str, Any]]:
    found = {f"{layout}, mixed": case(layout, "mixed") for layout in LAYOUTS}
    found |= {f"CP2 EP4, {rewards}": case("CP2 EP4", rewards) for rewards in REWARDS}
    found["PP2 VPP2 EP2, all silent"] = case("PP2 VPP2 EP2", "all silent")
    found["TP2 EP2, recompute"] = case("TP2 EP2", "mixed", "trainer.recompute=full")
    found["PP2 EP2, replay"] = case("PP2 EP2", "mixed", "objective.preset=grpo_replay", *GRPO_BAND)
    found["TP2 CP2, single"] = case("TP2 CP2", "mixed") | {"double": False}
    return found


CASES = cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("signal")
    run_world("signal_worker.py", WORLD, CASES, directory)
    return directory


def read(results: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of the plain path, and of the one that leaves passes out."""
    found = torch.load(results / f"{name}.pt", weights_only=False)
    return found["plain"], found["ours"]


def norm(tensors: dict[str, Tensor]) -> float:
    """Euclidean, over all of them."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_weights_are_those_of_the_plain_path(name: str, results: Path) -> None:
    plain, ours = read(results, name)
    double = CASES[name]["double"]
    bound = 1e-12 if double else 1e-6
    assert ours["losses"] == pytest.approx(plain["losses"], rel=bound, abs=bound)
    assert len(ours["gradients"]) == len(plain["gradients"]) == ours["updates"] == 2
    found, wanted = ([*one["gradients"], one["weights"]] for one in (ours, plain))
    # In float32 Adam turns the rounding of a gradient near 0 into a whole step.
    for mine, theirs in zip(found if double else found[:1], wanted if double else wanted[:1], strict=True):
        assert mine.keys() == theirs.keys()
        distance, size = norm({key: mine[key] - theirs[key] for key in theirs}), norm(theirs)
        assert distance <= bound * size
    assert ours["tokens"] < plain["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_plain_path(name: str, results: Path) -> None:
    plain, ours = (found["metrics"] for found in read(results, name))
    counted = [key for key in plain if key.startswith(("clip_", "trained_", "zero_"))]
    assert len(counted) > 10
    bound = 1e-12 if CASES[name]["double"] else 1e-6
    assert {key: ours[key] for key in counted} == pytest.approx({key: plain[key] for key in counted}, abs=bound)
    assert plain["scored_sequences"] == 1
    assert 1 - ours["zero_advantage_sequences"] - bound <= ours["scored_sequences"] < 1
    assert ours.keys() == plain.keys() and ours["scored_sequences"] > 0, "a sampled share has log-probs"


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_first_mini_batch_proves_that_both_passes_agree(name: str, results: Path) -> None:
    plain, ours = (found["metrics"] for found in read(results, name))
    for metrics in (plain, ours):
        assert metrics.get("log_s_abs_max/minibatch_0", 0.0) <= 1e-6
        assert metrics["experts/changed/minibatch_0"] == 0
