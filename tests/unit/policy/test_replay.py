"""The seam of routing replay: whose routes a call gets, what is counted, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy.replay import ABSENT, RouterSeam, Routes, Routing, from_stored, stored_type, to_stored

EXPERTS, TOPK = 6, 2
SCORES = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0], [9.0, 0.0, 1.0, 2.0, 3.0, 8.0], [0.0, 1.0, 7.0, 6.0, 2.0, 3.0]])
OWN = [[1, 3], [0, 5], [2, 3]]


def routing() -> tuple[Routing, RouterSeam]:
    """One chunk with one router, as the policy builds it."""
    found = Routing([torch.nn.Module()], EXPERTS)
    seam = RouterSeam(0, EXPERTS)
    found._of_chunk, found.seams, found.layers = [[seam]], [seam], [0]
    return found, seam


def batch(trained: list[bool]) -> Any:
    buckets = torch.zeros(len(trained), dtype=torch.int64)
    return SimpleNamespace(loss_mask=torch.tensor(trained), length_buckets=lambda: buckets)


def routes(*rows: list[list[int]]) -> list[Routes]:
    return [Routes((to_stored(torch.tensor(chosen), EXPERTS),)) for chosen in rows]


@pytest.mark.parametrize(("experts", "size"), [(8, 1), (255, 1), (256, 2), (1024, 2)])
def test_stored_form_keeps_every_expert_and_the_absent_ones(experts: int, size: int) -> None:
    indices = torch.tensor([[0, experts - 1], [ABSENT, ABSENT]])
    stored = to_stored(indices, experts)
    assert stored.element_size() == stored_type(experts).itemsize == size
    assert torch.equal(from_stored(stored), indices)


def test_recorded_experts_are_used_and_rows_without_any_are_routed_normally() -> None:
    found, seam = routing()
    given = routes([[4, 0], [ABSENT, ABSENT], [5, 1]])
    with found.run([batch([True] * 3)], trains=True, routes=given, replays=True), found.forward(0, 0):
        values, chosen = seam.get_replay_topk(SCORES, TOPK)
    assert chosen.tolist() == [[4, 0], OWN[1], [5, 1]]
    assert torch.equal(values, SCORES.gather(1, chosen))


def test_changes_are_counted_at_trained_tokens_with_and_without_replay() -> None:
    for replays in (False, True):
        found, seam = routing()
        given = routes([[3, 1], [0, 4], [4, 5]])
        with found.run([batch([True, True, False])], trains=True, routes=given, replays=replays), found.forward(0, 0):
            seam.get_replay_topk(SCORES, TOPK)
        assert [part.tolist() for part in found.changes()] == [[1, 0, 0, 0, 0, 0, 0]], (
            "the order does not count, untrained tokens do not"
        )


def test_choices_are_sorted_and_recorded() -> None:
    found, seam = routing()
    with found.run([batch([True] * 3)], trains=False, records=True), found.forward(0, 0):
        assert seam.get_replay_topk(SCORES, TOPK)[1].tolist() == OWN
    (entry,) = found.recorded(1)
    assert from_stored(entry.chosen[0]).tolist() == OWN
    assert entry.num_bytes == 3 * TOPK


def test_recomputations_get_the_routes_of_their_own_micro_batch() -> None:
    found, seam = routing()
    first, second = [[4, 0]] * 3, [[5, 2]] * 3
    seen: list[Tensor] = []
    with found.run([batch([True] * 3)] * 2, trains=True, routes=routes(first, second), replays=True):
        for index in (0, 1):
            with found.forward(0, index):
                seam.get_replay_topk(SCORES, TOPK)
        seen += [seam.get_replay_topk(SCORES, TOPK)[1] for _ in range(2)]
    assert [chosen.tolist() for chosen in seen] == [first, second]


def test_recomputing_only_some_micro_batches_is_an_error() -> None:
    found, seam = routing()
    given = routes(OWN, OWN)
    with (
        pytest.raises(RuntimeError, match="layer 0 recomputed 1 of 2 micro-batches"),
        found.run([batch([True] * 3)] * 2, trains=True, routes=given, replays=True),
    ):
        for index in (0, 1):
            with found.forward(0, index):
                seam.get_replay_topk(SCORES, TOPK)
        seam.get_replay_topk(SCORES, TOPK)


def test_a_call_outside_of_every_pass_is_an_error() -> None:
    found, seam = routing()
    with (
        found.run([batch([True] * 3)], trains=True),
        pytest.raises(RuntimeError, match="layer 0 was asked outside"),
    ):
        seam.get_replay_topk(SCORES, TOPK)


def test_routes_of_another_batch_are_refused() -> None:
    found, seam = routing()
    with (
        found.run([batch([True] * 3)], trains=True, routes=routes([[0, 1]] * 2), replays=True),
        found.forward(0, 0),
        pytest.raises(ValueError, match=r"routes \[2, 2\] of micro-batch 0 do not fit the router of layer 0"),
    ):
        seam.get_replay_topk(SCORES, TOPK)
