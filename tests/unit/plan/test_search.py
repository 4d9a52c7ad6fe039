"""`gspo plan --search`: how long it takes, what it knows, and whether the shipped recipes are near its best."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.search import search, search_layouts
from tests.chosen_layouts import CHOSEN, choice
from tools.plan_fit import read_runs

A22B = Path("recipes/qwen3_235b_a22b_gspo_100k.yaml")
NEAR = 1.05
"""Shipped recipes over the fastest step that fits; what is simpler may cost so much."""


@pytest.mark.parametrize("nodes", [8, 16, 32])
def test_235b_at_100k_takes_less_than_five_seconds(nodes: int) -> None:
    recipe = load_recipe(A22B, [f"placement.nodes={nodes}"])
    start = time.process_time()
    found = search(recipe)[0]
    assert time.process_time() - start < 5
    assert found.layouts and found.servers
    assert found.layouts[0].seconds <= found.layouts[-1].seconds


def test_fewer_nodes_are_tried_for_gpu_hours() -> None:
    found = search(load_recipe(A22B), "gpu-hours")
    assert {one.machine.nodes for one in found} == {4, 8, 16}
    assert [one.gpu_seconds for one in found] == sorted(one.gpu_seconds for one in found)
    first, fastest = found[0], search(load_recipe(A22B))[0]
    assert first.machine.nodes < fastest.machine.nodes and first.gpu_seconds < fastest.gpu_seconds
    assert first.change["placement.nodes"] == first.machine.nodes


def test_94_layers_may_have_chunks() -> None:
    found = search_layouts(recipe := load_recipe(A22B), make_plan(recipe).machine)
    chunks = {one.change["trainer.virtual_pipeline"] for one in found if one.change["trainer.pipeline_parallel"] == 8}
    assert chunks - {None}


def test_there_may_be_more_tensor_parallel_ranks_than_key_value_heads() -> None:
    found = search(load_recipe(A22B, ["placement.nodes=32"]))[0]
    assert {one.change["trainer.tensor_parallel"] for one in found.layouts} >= {4, 8}


@pytest.mark.parametrize(("name", "overrides"), CHOSEN)
def test_a_shipped_recipe_is_near_the_best(name: str, overrides: str) -> None:
    """And the README shows the choice beside the runner-up."""
    ratio, row = choice(name, overrides)
    assert ratio <= NEAR
    assert row in Path("recipes/README.md").read_text(), "run python -m tests.chosen_layouts"


FUSED = "trainer.megatron.moe_token_dispatcher_type=flex"


@pytest.mark.parametrize(
    ("run", "sizes", "chosen"),
    [
        # Tensor, context, pipeline, expert: what NVIDIA publishes for these lengths, batches and machines.
        ("30B EP16, 16 H100, 4K, plain all-to-all", (1, 1, 2, 8), ""),
        ("30B EP16, 16 H100, 4K, HybridEP, not overlapped", (1, 1, 1, 16), FUSED),
        ("235B TP4 PP8 EP8, 256 H100, 4K", (4, 1, 8, 8), ""),
        ("235B TP4 PP8 EP8 CP8, 256 H100, 128K", (4, 8, 8, 8), ""),
    ],
)
def test_published_layouts_are_near_the_best(run: str, sizes: tuple[int, ...], chosen: str) -> None:
    published = next(one for one in read_runs() if one.name == run)
    plan = replace(published, overrides=[*published.overrides, chosen]).plan
    found = search_layouts(plan.recipe, plan.machine)
    names = ("tensor", "context", "pipeline", "expert")
    same = [one for one in found if tuple(one.change[f"trainer.{name}_parallel"] for name in names) == sizes]
    assert same and same[0].seconds <= 1.1 * found[0].seconds


def test_servers_get_nodes_of_their_own_only_where_work_overlaps() -> None:
    base = Path("recipes/qwen3_30b_a3b_gspo.yaml")
    together = search(load_recipe(base))
    apart = search(load_recipe(base, ["rollout.max_staleness=1", "objective.correction=[tis]"]))
    assert [one.machine.rollout_nodes for one in together] == [0]
    assert {one.machine.rollout_nodes for one in apart} >= {0, 1, 2, 3}
    assert apart[0].seconds <= min(one.seconds for one in apart)
    # What is proposed is what is planned.
    changed = [f"{key}={'null' if value is None else str(value).lower()}" for key, value in apart[0].change.items()]
    plan = make_plan(load_recipe(base, ["rollout.max_staleness=1", "objective.correction=[tis]", *changed]))
    assert plan.compute is not None and plan.compute.seconds_per_step == pytest.approx(apart[0].seconds)
