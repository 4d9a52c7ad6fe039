"""Transformer Engine's spec of published models on the meta device, without a GPU: a step of `make cuda-dry`.

    python -m tests.parallel.engine_meta        one line of JSON; exit 1 where a parameter does not fit the weight table

Every name and shape that Megatron builds of Transformer Engine's modules is compared with the table, as the first, a
middle and the last rank; what is fused is counted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import layout_of
from gspo_megatron.policy import mesh
from gspo_megatron.policy.model import build_chunks
from gspo_megatron.policy.replay import Routing
from gspo_megatron.policy.specs import FUSES
from gspo_megatron.policy.weights import ShardedWeights

A3B, A22B, DENSE, TINY = (
    "recipes/qwen3_30b_a3b_gspo.yaml", "recipes/qwen3_235b_a22b_gspo.yaml", "recipes/qwen3_0p6b_gspo.yaml",
    "recipes/tiny_moe.yaml",
)  # fmt: skip
FOUR = "model.architecture.num_hidden_layers=4"
NARROW = "model.dtype=bfloat16"
YARN = "model.architecture.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}"
NO_CP = "trainer.context_parallel=1"
CASES: dict[str, tuple[str, int, list[str]]] = {
    "tiny": (TINY, 1, [NARROW]),
    "tiny, float32": (TINY, 1, ["model.dtype=float32"]),
    "tiny, TP2": (TINY, 2, [NARROW, "trainer.tensor_parallel=2"]),
    "tiny, TP2 ETP2": (TINY, 2, [NARROW, "trainer.tensor_parallel=2", "trainer.expert_tensor_parallel=2"]),
    "tiny, PP2 VPP2": (TINY, 2, [NARROW, "trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2"]),
    "tiny, CP2 EP2": (TINY, 4, [NARROW, "trainer.expert_parallel=2", "trainer.context_parallel=2"]),
    "30B, as shipped": (A3B, 32, [FOUR]),
    "30B, TP2 EP8 selective": (A3B, 16, [FOUR, "trainer.tensor_parallel=2", NO_CP, "trainer.recompute=selective"]),
    "30B, TP8 EP8": (A3B, 8, [FOUR, "trainer.tensor_parallel=8", NO_CP, "trainer.expert_parallel=8"]),
    "30B, PP2 VPP2": (A3B, 16, [FOUR, "trainer.pipeline_parallel=2", "trainer.virtual_pipeline=2", NO_CP]),
    "30B, YaRN CP8": (A3B, 8, [FOUR, "trainer.context_parallel=8", YARN]),
    "0.6B, tied": (DENSE, 1, [FOUR]),
    "0.6B, tied, TP2": (DENSE, 2, [FOUR, "trainer.tensor_parallel=2"]),
    "235B, TP2 PP8 CP4 EP16": (
        A22B, 128, ["model.architecture.num_hidden_layers=8", "trainer.first_stage_layers=null",
                    "trainer.last_stage_layers=null"],
    ),
}  # fmt: skip


def show_gpu() -> None:
    """Let what chooses between the two specs see a GPU; nothing is put on it."""
    major, minor = 9, 0
    device = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, name="NVIDIA H100 80GB HBM3", total_memory=85 << 30
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: "meta"  # type: ignore[assignment, return-value]
    torch.cuda.get_device_capability = lambda *_: (major, minor)
    torch.cuda.get_device_properties = lambda *_: device  # type: ignore[assignment, return-value]
    make, count = dist.new_group, torch.arange

    def new_group(*arguments: Any, **named: Any) -> Any:
        return make(*arguments, **named | {"backend": "fake"})

    def arange(*arguments: Any, **named: Any) -> Any:
        place = str(named.get("device", ""))
        return count(*arguments, **named | ({"device": "cpu"} if place.startswith("cuda") else {}))

    dist.new_group, torch.arange = new_group, arange  # type: ignore[assignment]


def look(path: str, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Build a layout's first, middle and last rank; what they hold. Raises what the weight table says does not fit."""
    recipe = load_recipe(Path(path), [f"trainer.ranks={ranks}", *overrides])
    layout = layout_of(recipe.trainer, ranks)
    held, fused, routers = 0, 0, 0
    for rank in sorted({0, ranks // 2, ranks - 1}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        mesh.build_groups(layout)
        with torch.device("meta"):
            chunks = build_chunks(recipe, torch.device("meta"))
        held += len(ShardedWeights(recipe.arch, layout, rank, chunks).parameters)
        routers += len(Routing(chunks, recipe.arch.num_experts).layers) if recipe.arch.num_experts else 0
        modules = [module for chunk in chunks for module in chunk.modules()]
        products = [module for module in modules if hasattr(module, FUSES)]
        assert products, "no module of Transformer Engine was built"
        assert all(getattr(module, FUSES) for module in products), "a product rounds its weight gradient"
        fused += len(products)
        dist.destroy_process_group()
    return {"parameters": held, "fused_products": fused, "routers": routers}


def main() -> int:
    """Look at every layout."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    show_gpu()
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            found[name] = look(*case)
        # Whatever a library raises is what is to be shown.
        except Exception as error:
            traceback.print_exc()
            found[name] = {"wrong": f"{type(error).__name__}: {str(error)[:300]}"}
            if dist.is_initialized():
                dist.destroy_process_group()
    print(json.dumps(found), flush=True)
    return int(any("wrong" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
