"""Builds published models on the meta device, as single ranks of big layouts; prints what each rank holds as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import Recipe
from gspo_megatron.policy import mesh
from gspo_megatron.policy.model import build_chunks
from gspo_megatron.policy.weights import ShardedWeights
from gspo_megatron.weights.layout import layout_of


def main() -> None:
    """Cases: [recipe as JSON, ranks] on stdin."""
    print(json.dumps([rank_shapes(Recipe.model_validate_json(text), ranks) for text, ranks in json.load(sys.stdin)]))


def rank_shapes(recipe: Recipe, ranks: list[int]) -> dict[int, dict[str, list[list[int]]]]:
    """For each rank: shapes of its dense and of its expert parameters, as megatron built them."""
    assert recipe.trainer.ranks is not None and recipe.model.architecture is not None
    layout = layout_of(recipe.trainer, recipe.trainer.ranks)
    found: dict[int, Any] = {}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
        mesh.build_groups(layout)
        with torch.device("meta"):
            chunks = build_chunks(recipe, torch.device("meta"))
        # Compares every parameter's name and shape with the weight table.
        held = ShardedWeights(recipe.model.architecture, layout, rank, chunks).parameters.values()
        found[rank] = {
            kind: [list(parameter.shape) for entry, parameter in held if entry.expert is expert]
            for kind, expert in (("dense", False), ("expert", True))
        }
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
