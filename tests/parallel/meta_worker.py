"""Builds published models on the meta device, as every rank of big layouts; prints what each rank holds as JSON."""

from __future__ import annotations

import gc
import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import Recipe
from gspo_megatron.models import parse_recipe
from gspo_megatron.parallel import layout_of
from gspo_megatron.policy import mesh
from gspo_megatron.policy.model import build_chunks
from gspo_megatron.policy.weights import ShardedWeights

Shapes = dict[str, list[int]]


def main() -> None:
    """Recipes as JSON on stdin, `trainer.ranks` set."""
    gc.disable()  # two fifths of the time: it looks through every model built so far
    print(json.dumps([rank_shapes(parse_recipe(json.loads(text))) for text in json.load(sys.stdin)]))


def rank_shapes(recipe: Recipe) -> list[Shapes]:
    """For each rank: global name and shape of every parameter, as megatron built it."""
    assert recipe.trainer.ranks is not None
    layout = layout_of(recipe.trainer, recipe.trainer.ranks)
    found: list[Shapes] = []
    for rank in range(layout.world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
        mesh.build_groups(layout)
        with torch.device("meta"):
            chunks = build_chunks(recipe, torch.device("meta"))
        # Compares every parameter's name and shape with the weight table.
        held = ShardedWeights(recipe.arch, layout, rank, chunks).parameters
        found.append({name: list(parameter.shape) for name, (_, parameter) in held.items()})
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
