"""What the ranks of a pack exchange, counted from the collectives of a gloo world of 4: less with dynamic packs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parallel.world import run_world

COMMON = [
    "trainer.context_parallel=4",
    "trainer.micro_batch_tokens=256",
    "trainer.expert_parallel=2",
    "model.architecture.num_key_value_heads=4",
]
DYNAMIC = "trainer.dynamic_context_parallel=true"
HEADS = "trainer.megatron.cp_comm_type=a2a"
LEVELS = "trainer.megatron={cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 2]}"
WAYS = {"heads": [*COMMON, HEADS], "levels": [*COMMON, LEVELS], "dynamic heads": [*COMMON, DYNAMIC, HEADS]}
CASES = {"static": COMMON, "dynamic": [*COMMON, DYNAMIC], **WAYS}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("bytes")
    run_world("context_bytes_worker.py", 4, CASES, directory)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_what_is_received_is_what_the_plan_counts(results: dict[str, dict[str, Any]], case: str) -> None:
    assert results[case]["received"] == results[case]["formula"] > 0


def test_packs_that_fewer_ranks_share_exchange_less_and_score_the_same(results: dict[str, dict[str, Any]]) -> None:
    static, dynamic = results["static"], results["dynamic"]
    assert static["sizes"] == [4]
    assert len(dynamic["sizes"]) > 1
    assert dynamic["received"] < 0.6 * static["received"]
    assert dynamic["logprobs"] == pytest.approx(static["logprobs"], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_meet_keys_and_values_scores_the_same(results: dict[str, dict[str, Any]], way: str) -> None:
    assert results[way]["logprobs"] == pytest.approx(results["static"]["logprobs"], rel=1e-5)
