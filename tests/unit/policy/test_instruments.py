"""Numbers about the experts, against counts made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy.instruments import RouterInstruments
from gspo_megatron.policy.replay import ABSENT, RouterSeam, Routes, Routing, to_stored

EXPERTS = 4


class FixedPolicy:
    """Two layers of 4 experts, 2 a token, on one rank; `choices` [layer] of [tokens, 2] is how it routes."""

    def __init__(self) -> None:
        arch = SimpleNamespace(num_hidden_layers=2, num_experts=EXPERTS)
        self.recipe = SimpleNamespace(arch=arch)
        self.device, self.at = torch.device("cpu"), SimpleNamespace(tensor=0, pipeline=0)
        self.routing = Routing([torch.nn.Module()], EXPERTS)
        self.routing.seams = [RouterSeam(layer, EXPERTS) for layer in range(2)]
        self.routing.layers = [0, 1]
        self.choices: list[list[list[int]]] = []

    def score(self, batches: Any, records: bool) -> None:
        """Record the present choices."""
        for seam, chosen in zip(self.routing.seams, self.choices, strict=True):
            seam.recorded = {0: to_stored(torch.tensor(chosen), EXPERTS)}


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)  # one rank
    return FixedPolicy()


def batch(trained: list[bool], routes: torch.Tensor | None = None) -> Any:
    mask = torch.tensor(trained)
    buckets = torch.arange(len(mask))
    return SimpleNamespace(
        loss_mask=mask, token_ids=torch.zeros(len(mask)), routes=routes, length_buckets=lambda: buckets
    )


def changed(*by_length: int) -> torch.Tensor:
    return torch.tensor([*by_length, *[0] * (7 - len(by_length))], dtype=torch.float64)


def stored(*layers: list[list[int]]) -> Routes:
    return Routes(tuple(to_stored(torch.tensor(chosen), EXPERTS) for chosen in layers))


def test_load_of_trained_tokens(policy: Any) -> None:
    instruments = RouterInstruments(policy)
    routes = stored([[0, 1], [0, 1], [2, 3]], [[0, 1], [2, 3], [0, 0]])
    instruments.add_load([batch([True, True, False])], [routes])
    found = instruments.reduce()
    assert found["experts/load_max_over_mean/layer_0"] == pytest.approx(2.0)  # 2 of 4 choices, even would be 1
    assert found["experts/load_max_over_mean/layer_1"] == pytest.approx(1.0)
    assert found["experts/load_entropy/layer_0"] == pytest.approx(0.5)  # ln 2 / ln 4
    assert found["experts/load_entropy/layer_1"] == pytest.approx(1.0)
    assert (found["experts/load_max_over_mean"], found["experts/load_entropy"]) == pytest.approx((2.0, 0.5))
    assert found["experts/route_bytes"] == 12 and found["experts/route_bytes_per_token"] == 4


def test_changes_of_updates_and_of_the_probe(policy: Any) -> None:
    instruments = RouterInstruments(policy)
    routes = stored([[0, 1]] * 2, [[0, 1]] * 2)
    for changes in ((0, 0), (1, 3)):
        for seam, count in zip(policy.routing.seams, changes, strict=True):
            seam.changed = {0: changed(count)}
        instruments.add_update([batch([True, True])], [routes])
    probe = batch([False, True])
    for choices in ([[[0, 1], [0, 1]], [[0, 1], [2, 3]]], [[[2, 3], [1, 0]], [[0, 1], [2, 0]]]):
        policy.choices = choices
        instruments.probe(probe)
    found = instruments.reduce()
    assert (found["experts/changed/minibatch_0"], found["experts/changed/minibatch_1"]) == (0.0, 0.5)
    assert (found["experts/changed/layer_0"], found["experts/changed/layer_1"]) == (0.25, 0.75)
    assert (found["experts/probe_changed/layer_0"], found["experts/probe_changed/layer_1"]) == (0.0, 0.5)
    assert found["experts/probe_changed"] == 0.25
    assert "experts/changed" not in instruments.reduce(), "every step starts anew"


def test_disagreement_with_the_sampler_counts_what_it_reported(policy: Any) -> None:
    instruments = RouterInstruments(policy)
    reported = torch.tensor([[[0, 1], [0, 1]], [[ABSENT, ABSENT], [2, 3]], [[0, 1], [0, 1]]])
    for seam, counts in zip(policy.routing.seams, ((1, 0), (0, 1)), strict=True):
        # The second micro-batch was scored without them.
        seam.changed = {0: changed(*counts), 1: changed(5)}
    given = batch([True, True, False], reported)
    instruments.add_disagreement([given, given], [0])
    found = instruments.reduce()
    assert found["experts/sampler_disagreement/layer_0"] == 0.5
    assert found["experts/sampler_disagreement/layer_1"] == 0.25
    assert found["experts/sampler_disagreement"] == pytest.approx(2 / 6)
    # Rows 0 and 1 lie in sequences of different lengths; row 2 is not trained.
    assert found["experts/sampler_disagreement/le_64"] == 0.25
    assert found["experts/sampler_disagreement/le_256"] == 0.5
    assert "experts/sampler_disagreement/le_1024" not in found
    assert found["experts/sampler_route_bytes"] == 10, "of every token that was reported, trained or not"


def test_a_dense_model_has_none(policy: Any) -> None:
    policy.recipe.arch.num_experts = 0
    instruments = RouterInstruments(policy)
    instruments.add_update([batch([True])], [Routes(())])
    instruments.probe(batch([True]))
    assert instruments.reduce() == {}
