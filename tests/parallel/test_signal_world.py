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
    "EP": "expert_parallel", "ETP": "expert_tensor_parallel", "dynamic": "dynamic_context_parallel",
}  # fmt: skip
LAYOUTS = ["TP2", "TP2 EP2", "EP2", "EP4", "CP2", "CP2 EP4", "PP2", "PP2 VPP2", "PP2 VPP2 EP2", "TP2 PP2 EP2",
           "TP2 CP2 EP2", "PP2 CP2", "CP4 dynamic EP2", "TP2 CP2 dynamic EP4"]  # fmt: skip


def overrides_of(layout: str) -> list[str]:
    """`dynamic` has no number."""
    words = [(TRAINER[word.rstrip("0123456789")], word.lstrip("EPTCV")) for word in layout.split()]
    return [f"trainer.{key}={size if size.isdigit() else 'true'}" for key, size in words]


GRPO_BAND = ("objective.clip_low=0.2", "objective.clip_high=0.27")


SAMPLER = "objective.ratio_reference=sampler"
RECOMPUTE = "trainer.recompute=full"
ROUTES = "objective.replay=sampler"


def case(layout: str, rewards: str, *more: str, clipped: str = "none") -> dict[str, Any]:
    return {"overrides": [*overrides_of(layout), *more], "rewards": rewards, "double": True, "clipped": clipped}


PATTERNS = ("odd", "two prompts", "all but one", "all")


def clipped_cases() -> dict[str, dict[str, Any]]:
    """Sequences with advantage 0, clipped ones and others in one mini-batch."""
    more = (RECOMPUTE, *GRPO_BAND)
    found = {}
    for number, layout in enumerate(["", *LAYOUTS]):
        # Pipeline stages leave out whole micro-batches only, which half of every group never makes.
        clipped = PATTERNS[number % 4 if "PP" not in layout else 1 + number % 3]
        found[f"{layout}, {clipped} clipped"] = case(layout, "live", *more, clipped=clipped)
    found["EP2, odd clipped"] = case("EP2", "live", *more, clipped="odd")
    found["EP4, two prompts clipped"] = case("EP4", "live", *more, clipped="two prompts")
    found["EP4, all clipped, no recompute"] = case("EP4", "live", *GRPO_BAND, clipped="all")
    selective = ("trainer.recompute=selective", *GRPO_BAND)
    found["PP2 VPP2, all but one clipped, selective"] = case("PP2 VPP2", "live", *selective, clipped="all but one")
    for layout in ("TP2 EP2", "PP2 EP2"):
        replay = case(layout, "live", *more, "objective.replay=trainer", clipped="odd")
        found[f"{layout}, odd clipped, replay"] = replay
        found[f"{layout}, odd clipped, routes"] = case(layout, "live", *more, ROUTES, clipped="odd")
    offload = (*more, "trainer.offload_activations=true")
    found["TP2 CP2, odd clipped, offload"] = case("TP2 CP2", "live", *offload, clipped="odd")
    # Weights that stay what they are: the second gradient tells what the rounding of its own passes is.
    single = case("TP2 EP2", "live", *more, "optimizer.lr=1e-12", clipped="odd")
    found["TP2 EP2, odd clipped, single"] = single | {"double": False, "compared": 2}
    return found


def cases() -> dict[str, dict[str, Any]]:
    found = {f"{layout}, mixed": case(layout, "mixed") for layout in ("TP2 CP2 EP2", "PP2 VPP2 EP2")}
    found |= {f"CP2 EP4, {rewards}": case("CP2 EP4", rewards) for rewards in REWARDS}
    found["PP2 VPP2 EP2, all silent"] = case("PP2 VPP2 EP2", "all silent")
    found["TP2 EP2, recompute"] = case("TP2 EP2", "mixed", RECOMPUTE)
    found["PP2 EP2, replay"] = case("PP2 EP2", "mixed", "objective.preset=grpo_replay", *GRPO_BAND)
    for layout in ("TP2 EP2", "PP2 VPP2"):
        found[f"{layout}, sampler"] = case(layout, "live", RECOMPUTE, SAMPLER)
    found["CP2 EP2, sampler, routes"] = case("CP2 EP2", "live", RECOMPUTE, SAMPLER, ROUTES)
    found["PP2 VPP2, mixed, routes"] = case("PP2 VPP2", "mixed", ROUTES)
    # In float32 Adam turns the rounding of a gradient near 0 into a whole step: the first gradient tells.
    found["TP2 CP2, single"] = case("TP2 CP2", "mixed") | {"double": False, "compared": 1}
    return found


CLIPPED_CASES = clipped_cases()
CASES = cases() | CLIPPED_CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("signal")
    run_world("signal_worker.py", WORLD, CASES, directory, timeout=1200)
    return directory


def read(results: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of the plain path, and of the one that leaves passes out."""
    found = torch.load(results / f"{name}.pt", weights_only=False)
    return found["plain"], found["ours"]


def is_against_sampler(name: str) -> bool:
    """Whether the ratio of a case divides by the sampler's log-probs."""
    return SAMPLER in CASES[name]["overrides"]


def norm(tensors: dict[str, Tensor]) -> float:
    """Euclidean, over all of them."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_weights_are_those_of_the_plain_path(name: str, results: Path) -> None:
    plain, ours = read(results, name)
    double, compared = CASES[name]["double"], CASES[name].get("compared")
    bound = 1e-12 if double else 1e-6
    assert ours["losses"] == pytest.approx(plain["losses"], rel=bound, abs=bound)
    assert len(ours["gradients"]) == len(plain["gradients"]) == ours["updates"] == 2
    found, wanted = ([*one["gradients"], one["weights"]] for one in (ours, plain))
    for mine, theirs in zip(found[:compared], wanted[:compared], strict=True):
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
    lost = ("policy_", *(() if ROUTES in CASES[name]["overrides"] else ("experts/changed",)))
    lost = lost if is_against_sampler(name) else ()
    assert ours.keys() == {key for key in plain if not key.startswith(lost)} and ours["scored_sequences"] > 0, (
        "a sampled share has log-probs"
    )


@pytest.mark.parametrize("name", CASES)
def test_passes_of_the_old_policy_are_those_that_something_reads(name: str, results: Path) -> None:
    plain, ours = read(results, name)
    assert len(plain["asked"]) == 2
    share = ours["metrics"]["compared_sequences"] / ours["metrics"]["scored_sequences"]
    if is_against_sampler(name):
        assert ours["asked"] == [] and 0 < share < 1
    else:
        assert len(ours["asked"]) == 2 and ours["asked"][0] == 1 and share == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_first_mini_batch_proves_that_both_passes_agree(name: str, results: Path) -> None:
    plain, ours = (found["metrics"] for found in read(results, name))
    if is_against_sampler(name):
        return
    for metrics in (plain, ours):
        assert metrics.get("log_s_abs_max/minibatch_0", 0.0) <= 1e-6
        # Routes of the sampler are random here, and all are replaced.
        assert (metrics["experts/changed/minibatch_0"] > 0.5) == (ROUTES in CASES[name]["overrides"])
        assert metrics["experts/changed/minibatch_0"] == 0 or "experts/sampler_disagreement" in metrics


@pytest.mark.parametrize("name", CLIPPED_CASES)
def test_clipped_sequences_take_no_backward_pass(name: str, results: Path) -> None:
    plain, ours = read(results, name)
    assert ours["metrics"]["clip_fraction_sequences/minibatch_1"] > 0.3
    assert ours["passes"]["head"] < plain["passes"]["head"]
    if RECOMPUTE in CASES[name]["overrides"]:
        assert ours["passes"]["layers"] < plain["passes"]["layers"]
