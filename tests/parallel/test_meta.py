"""The published models at their real size: counts, and the shards that megatron builds beside the planner's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.config import Recipe, load
from gspo_megatron.plan import flops, memory
from gspo_megatron.weights.layout import layout_of
from gspo_megatron.weights.table import count_parameters

ROOT = Path(__file__).parents[2]
A3B, A22B = "recipes/qwen3_30b_a3b_gspo.yaml", "recipes/qwen3_235b_a22b_gspo.yaml"
CASES = {
    "235B, TP2 PP8 CP8 EP16 on 128 ranks": (
        A22B,
        [128, "tensor_parallel=2", "pipeline_parallel=8", "context_parallel=8", "expert_parallel=16"],
    ),
    "235B, TP4 PP8 CP8 EP32 on 256 ranks": (
        A22B,
        [256, "tensor_parallel=4", "pipeline_parallel=8", "context_parallel=8", "expert_parallel=32"],
    ),
}


def recipe_of(path: str, asked: list) -> Recipe:
    ranks, *sizes = asked
    uneven = ["first_stage_layers=11", "last_stage_layers=11"]
    return load(Path(path), [f"trainer.ranks={ranks}", *(f"trainer.{value}" for value in [*sizes, *uneven])])


@pytest.mark.parametrize(("path", "total", "active"), [(A3B, 30.53e9, 3.35e9), (A22B, 235.09e9, 22.2e9)])
def test_counts_of_the_published_models(path: str, total: float, active: float) -> None:
    arch = load(Path(path)).model.architecture
    assert arch is not None
    assert count_parameters(arch) == pytest.approx(total, rel=1e-3)
    assert flops.active_parameters(arch) == pytest.approx(active, rel=1e-3)


@pytest.fixture(scope="module")
def built() -> dict:
    """Megatron's shapes on the first and last rank of every stage."""
    wanted = []
    for path, asked in CASES.values():
        recipe = recipe_of(path, asked)
        world = asked[0]
        stage = world // 8
        ranks = [rank for start in range(0, world, stage) for rank in (start, start + stage - 1)]
        wanted.append([recipe.model_dump_json(), ranks])
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.meta_worker"],
        input=json.dumps(wanted), capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    return dict(zip(CASES, json.loads(said.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_ranks_shards_are_the_planners(built: dict, name: str) -> None:
    recipe = recipe_of(*CASES[name])
    layout, arch = layout_of(recipe.trainer, CASES[name][1][0]), recipe.model.architecture
    assert arch is not None
    total = 0
    for rank, shapes in built[name].items():
        stage = layout.coordinates(int(rank)).pipeline
        (planned,) = memory.held_by(arch, layout, stage)
        for kind in ("dense", "expert"):
            assert sorted(map(math.prod, shapes[kind])) == sorted(getattr(planned, kind)), f"rank {rank}, {kind}"
        if int(rank) % (layout.world // layout.pipeline) == 0:
            total += sum(planned.expert) * layout.expert * layout.expert_tensor
    assert total == 94 * 128 * 3 * arch.hidden_size * arch.moe_intermediate_size
