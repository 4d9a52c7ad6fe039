"""The published models at their real size: counts, and the shards that megatron builds beside the planner's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import Parameter, count_parameters, local_parameters
from gspo_megatron.parallel import Layout, layout_of
from gspo_megatron.plan.estimate import flops, memory
from tests.places import ROOT

A3B, A22B = "recipes/qwen3_30b_a3b_gspo.yaml", "recipes/qwen3_235b_a22b_gspo.yaml"
ENDS = {"first_stage_layers": 11, "last_stage_layers": 11}
CASES = {
    "235B, TP2 PP8 CP8 EP16 on 128 ranks": (
        A22B,
        {"tensor_parallel": 2, "pipeline_parallel": 8, "context_parallel": 8, "expert_parallel": 16} | ENDS,
    ),
    "235B, TP4 PP8 CP8 EP32 on 256 ranks": (
        A22B,
        {"tensor_parallel": 4, "pipeline_parallel": 8, "context_parallel": 8, "expert_parallel": 32} | ENDS,
    ),
    "30B, TP2 PP2 CP2 EP8 on 16 ranks": (
        A3B,
        {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2, "expert_parallel": 8},
    ),
}
Shapes = dict[str, list[int]]


def recipe_of(name: str) -> Recipe:
    path, sizes = CASES[name]
    return load_recipe(
        Path(path), [f"trainer.ranks={name.split()[-2]}", *(f"trainer.{k}={v}" for k, v in sizes.items())]
    )


@pytest.mark.parametrize(("path", "total", "active"), [(A3B, 30.53e9, 3.35e9), (A22B, 235.09e9, 22.2e9)])
def test_counts_of_the_published_models(path: str, total: float, active: float) -> None:
    arch = load_recipe(Path(path)).arch
    assert count_parameters(arch) == pytest.approx(total, rel=1e-3)
    assert flops.active_parameters(arch) == pytest.approx(active, rel=1e-3)


@pytest.fixture(scope="module")
def built() -> dict[str, list[Shapes]]:
    """Megatron's parameters on every rank."""
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.meta_worker"],
        input=json.dumps([recipe_of(name).model_dump_json() for name in CASES]),
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    return dict(zip(CASES, json.loads(said.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, built: dict[str, list[Shapes]]) -> tuple[Recipe, Layout, list[Shapes]]:
    recipe, ranks = recipe_of(request.param), built[request.param]
    assert recipe.trainer.ranks == len(ranks)
    return recipe, layout_of(recipe.trainer, len(ranks)), ranks


def table_of(recipe: Recipe, layout: Layout, rank: int) -> list[Parameter]:
    return local_parameters(recipe.arch, layout, layout.coordinates(rank))


def test_every_ranks_shards_are_the_planners(case: tuple[Recipe, Layout, list[Shapes]]) -> None:
    """The planner counts one rank of a stage, from the weight table: every rank must hold as much as megatron built."""
    recipe, layout, ranks = case
    for rank, shapes in enumerate(ranks):
        table = table_of(recipe, layout, rank)
        assert {entry.name: list(entry.shape) for entry in table} == shapes, f"rank {rank}"
        (planned,) = memory.held_by(recipe.arch, layout, layout.coordinates(rank).pipeline)
        for kind, expert in (("dense", False), ("expert", True)):
            sizes = [math.prod(shapes[entry.name]) for entry in table if entry.expert is expert]
            assert sorted(sizes) == sorted(getattr(planned, kind)), f"rank {rank}, {kind}"


def test_shards_of_all_ranks_are_the_model(case: tuple[Recipe, Layout, list[Shapes]]) -> None:
    """What megatron built on all ranks, each shard once however many ranks hold it, is the published count."""
    recipe, layout, ranks = case
    once = {
        entry.pieces: math.prod(shapes[entry.name])
        for rank, shapes in enumerate(ranks)
        for entry in table_of(recipe, layout, rank)
    }
    assert sum(once.values()) == count_parameters(recipe.arch)
