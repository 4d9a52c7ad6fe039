"""The planner's exact bytes against what the trainer allocates, on gloo, to the byte, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_megatron.cluster.machines import machine_of
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import trained_parameters
from gspo_megatron.models.registry import family_of
from gspo_megatron.plan.estimate.activations import Shape
from gspo_megatron.plan.estimate.batch import plan_batch
from gspo_megatron.plan.estimate.memory import Held, exact_bytes, stage_memory
from gspo_megatron.plan.rules.layout import layout_of
from gspo_megatron.types import ITEM_BYTES
from tests.parallel.world import run_world

RECIPE = Path("recipes/tiny_moe.yaml")
TOKENS = 64
"""Of the worker's micro-batches."""
TWO_RANKS = {
    "DP2": [],
    "TP2": ["trainer.tensor_parallel=2"],
    "PP2": ["trainer.pipeline_parallel=2"],
    "PP2 uneven": ["trainer.pipeline_parallel=2", "trainer.first_stage_layers=1", "trainer.last_stage_layers=3"],
    "PP2 VPP2": ["trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2"],
    "EP2": ["trainer.expert_parallel=2"],
    "ETP2": ["trainer.expert_tensor_parallel=2"],
    "CP2": ["trainer.context_parallel=2"],
    "EP2 bfloat16": ["trainer.expert_parallel=2", "model.dtype=bfloat16"],
    "PP2 offload": [
        "trainer.pipeline_parallel=2",
        "trainer.recompute=full",
        "trainer.offload_activations=true",
        "trainer.micro_batch_tokens=64",
    ],
    "TP2 qwen2": [
        "trainer.tensor_parallel=2",
        "model.architecture.model_type=qwen2",
        "model.architecture.num_experts=0",
        "model.architecture.num_experts_per_tok=0",
        "model.architecture.moe_intermediate_size=0",
    ],
    "PP2 ppo": ["trainer.pipeline_parallel=2", "objective.preset=ppo"],
    "TP2 ppo bfloat16": ["trainer.tensor_parallel=2", "objective.preset=ppo", "model.dtype=bfloat16"],
    "PP2 tied": ["trainer.pipeline_parallel=2", "model.architecture.tie_word_embeddings=true"],
}
FOUR_RANKS = {
    "TP2 PP2 EP2": ["trainer.tensor_parallel=2", "trainer.pipeline_parallel=2", "trainer.expert_parallel=2"],
    "PP2 VPP2 CP2 EP2": [
        "trainer.pipeline_parallel=2",
        "trainer.virtual_pipeline=2",
        "trainer.context_parallel=2",
        "trainer.expert_parallel=2",
    ],
    "TP4 EP2, 2 KV heads": [
        "trainer.tensor_parallel=4",
        "trainer.expert_parallel=2",
        "model.architecture.num_key_value_heads=2",
    ],
    "TP2 EP2 ETP2 bfloat16": [
        "trainer.tensor_parallel=2",
        "trainer.expert_parallel=2",
        "trainer.expert_tensor_parallel=2",
        "model.dtype=bfloat16",
    ],
}


@pytest.mark.parametrize(("size", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_exact_bytes_are_what_the_trainer_allocates(size: int, cases: dict[str, list[str]], tmp_path: Path) -> None:
    run_world("plan_memory_worker.py", size, list(cases.values()), tmp_path)
    for rank in range(size):
        measured = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        for (name, overrides), found in zip(cases.items(), measured, strict=True):
            assert found == planned(overrides, size, rank), f"{name}, rank {rank}"


def planned(overrides: list[str], size: int, rank: int) -> dict[str, int]:
    recipe = load_recipe(RECIPE, overrides)
    arch, layout = recipe.arch, layout_of(recipe.trainer, size)
    at = layout.coordinates(rank)
    critic = recipe.objective.has_critic
    chunks = [Held.of(trained_parameters(arch, layout, at, chunk, critic)) for chunk in range(layout.virtual)]
    found = exact_bytes(chunks, layout, ITEM_BYTES[recipe.model.dtype], distributed=False, on_cpu=True)
    if recipe.model.dtype == "float32" and family_of(arch).megatron_settings(arch).transformer["qk_layernorm"]:
        found["projection"] = Shape(arch, layout, TOKENS, 4, recipe.trainer.recompute).projection_bytes
    if recipe.trainer.offload_activations and at.pipeline == 0:
        stages = stage_memory(recipe, layout, plan_batch(recipe, layout), machine_of(recipe, size))
        found["offloaded"] = stages[0].offloaded
    return found
