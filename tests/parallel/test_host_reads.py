"""Layers ask the device for nothing: on a GPU every question of the host waits for all that was queued before it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parallel.layouts import architecture_overrides
from tests.parallel.world import run_world

YARN = "model.architecture.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32}"
KINDS = {
    "plain": {"overrides": [], "fused": False},
    "yarn": {"overrides": [YARN], "fused": False},
    "fused kernel": {"overrides": [], "fused": True},
}
EXPERTS = {"tolist at experts.py:forward", "tolist at moe_utils.py:sort_chunks_by_idxs"}
LAYOUT = ["trainer.context_parallel=2", "trainer.recompute=full"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("reads")
    names = [(kind, shape) for kind in KINDS for shape in ("dense", "moe")]
    cases = [
        {**KINDS[kind], "overrides": [*architecture_overrides(shape), *KINDS[kind]["overrides"], *LAYOUT]}
        for kind, shape in names
    ]
    run_world("host_reads_worker.py", 2, cases, directory)
    return dict(zip(names, json.loads((directory / "reads-0.json").read_text()), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_reads_nothing(found: dict[tuple[str, str], dict[str, Any]], kind: str) -> None:
    assert found[kind, "dense"]["reads"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_reads_only_how_many_tokens_its_experts_get(
    found: dict[tuple[str, str], dict[str, Any]], kind: str
) -> None:
    """Which `all_to_all` and a list of products must know on the host, in megatron's own modules."""
    assert set(found[kind, "moe"]["reads"]) == EXPERTS


def test_one_gathered_call_and_the_kernel_compute_the_same(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    for shape in ("dense", "moe"):
        assert found["plain", shape]["logprobs"] == found["fused kernel", shape]["logprobs"]
        assert found["plain", shape]["logprobs"] != found["yarn", shape]["logprobs"]
