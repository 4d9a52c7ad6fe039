"""A wasteful layout is named by the single change that is better; a good one is not."""

from __future__ import annotations

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan.run_plan import make_plan
from tests.places import ROOT

BASE = "qwen3_30b_a3b_gspo.yaml"
WASTEFUL = [
    ("trainer.tensor_parallel=8", "trainer.tensor_parallel"),
    ("rollout.max_concurrency=4", "rollout.tensor_parallel"),
    ("rollout.tensor_parallel=8 rollout.servers=4 batch.prompts=1024", "rollout.tensor_parallel"),
    ("placement.nodes=5 placement.rollout_nodes=1 rollout.servers=4", "placement.rollout_nodes"),
]


def codes(name: str, words: str = "") -> dict[str, str]:
    plan = make_plan(load_recipe(ROOT / "recipes" / name, words.split()))
    return {found.code: found.key for found in plan.findings if found.severity == "info"}


@pytest.mark.parametrize(("words", "key"), WASTEFUL)
def test_a_layout_that_wastes_time_names_what_is_faster(words: str, key: str) -> None:
    assert codes(BASE, words).get("faster-change") == key


@pytest.mark.parametrize("recipe", [path.name for path in sorted((ROOT / "recipes").glob("qwen3_*.yaml"))])
def test_what_is_shipped_has_no_faster_neighbour(recipe: str) -> None:
    assert not {"faster-change", "nodes-to-spare"} & codes(recipe).keys()


def test_more_nodes_than_help_are_named() -> None:
    assert codes(BASE, "placement.nodes=16 rollout.servers=64 batch.prompts=8")["nodes-to-spare"] == "placement.nodes"
    assert "nodes-to-spare" not in codes(BASE, "batch.prompts=1024")
