"""What the sampler's routes change, measured on one micro-batch, against numbers made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.trainer.old_policy import OldPolicy

SAMPLER = torch.tensor([-1.0, -2.0, -3.0])
TRAINED = torch.tensor([True, False, True])


class FixedPolicy:
    """Its log-probs are the sampler's where routes are given, and some off them without."""

    def __init__(self, tensor: int = 0) -> None:
        self.device, self.is_last_stage, self.at = torch.device("cpu"), True, SimpleNamespace(tensor=tensor)
        self.calls: list[tuple[int, bool]] = []
        reported = lambda batches, topk: ["routes"] * len(batches)  # noqa: E731
        self.routing = SimpleNamespace(reported=reported, recorded=lambda count: ["recorded"] * count)

    def score(self, batches: Any, records: bool = False, routes: Any = None) -> list[Any]:
        self.calls.append((len(batches), routes is not None))
        off = torch.zeros(3) if routes is not None else torch.tensor([0.5, 9.0, -0.25])
        return [SimpleNamespace(logprobs=SAMPLER + off) for _ in batches]


def make(policy: Any, replay: str, skips: bool, scores: bool = True) -> OldPolicy:
    recipe: Any = SimpleNamespace(
        objective=SimpleNamespace(replay=replay),
        arch=SimpleNamespace(num_experts_per_tok=2),
        scores_old_policy=scores,
        skips_zero_gradients=skips,
    )
    routers: Any = SimpleNamespace(add_disagreement=lambda *a: None, add_load=lambda *a: None)
    return OldPolicy(recipe, policy, routers)


def batches(count: int) -> list[Any]:
    return [SimpleNamespace(loss_mask=TRAINED, rollout_logprobs=SAMPLER) for _ in range(count)]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *a: None)


def test_one_micro_batch_is_scored_with_the_routes_and_without() -> None:
    policy = FixedPolicy()
    old = make(policy, "sampler", skips=True)
    first, second = old.score(batches(3), is_first=True), old.score(batches(2), is_first=False)
    assert policy.calls == [(1, True), (1, False), (2, True)]
    assert (first.routes, first.is_routed) == (["recorded", "routes", "routes"], [True, False, False])
    assert (second.routes, second.is_routed) == (["recorded"] * 2, [True] * 2)
    found = old.reduce()
    k3 = ((math.exp(0.5) - 1 - 0.5) + (math.exp(-0.25) - 1 + 0.25)) / 2
    assert found == pytest.approx({
        "mismatch_sampled/replay_mean": 0.0, "mismatch_sampled/replay_k3": 0.0, "mismatch_sampled/replay_largest": 0.0,
        "mismatch_sampled/free_mean": 0.375, "mismatch_sampled/free_k3": k3, "mismatch_sampled/free_largest": 0.5,
    })  # fmt: skip
    assert old.reduce() == {}, "every step starts anew"


def test_without_a_pass_of_the_old_policy_the_training_pass_gets_the_routes() -> None:
    policy = FixedPolicy()
    found = make(policy, "sampler", skips=True, scores=False).score(batches(2), is_first=True)
    assert (found.routes, found.is_routed, policy.calls) == (["routes"] * 2, [False] * 2, [])


def test_other_replays_compare_nothing() -> None:
    for replay in ("off", "trainer"):
        policy = FixedPolicy()
        old = make(policy, replay, skips=False)
        old.score(batches(2), is_first=True)
        assert policy.calls == [(2, False)] and old.reduce() == {}


def test_a_tensor_parallel_rank_counts_once() -> None:
    old = make(FixedPolicy(tensor=1), "sampler", skips=False)
    old.score(batches(1), is_first=True)
    assert old.reduce() == {}
