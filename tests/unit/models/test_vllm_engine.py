"""The KV cache of a server without a GPU, which vLLM takes whole at its start: twice what runs at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.models.vllm_engine import GIB, engine_arguments, kv_cache_bytes

TINY = Path("recipes/tiny_moe.yaml")
TOKEN = 2 * 4 * 2 * 32 * 4
"""Bytes of keys and values of a token: layers, heads, their width, float32."""


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ([], (512 + 1) * 128 * TOKEN),
        (["rollout.max_concurrency=8"], (16 + 1) * 128 * TOKEN),
        (["rollout.max_answer_tokens=96", "rollout.max_prompt_tokens=32"], (512 + 1) * 128 * TOKEN),
        (["rollout.vllm={block_size: 32}"], (1024 + 1) * 32 * TOKEN),
        (["model.dtype=bfloat16", "weight_update.canary_bound=0.05"], (512 + 1) * 128 * TOKEN // 2),
        (["rollout.max_concurrency=8192"], GIB),
        (["rollout.kv_cache_gib=0.5"], GIB // 2),
    ],
    ids=str,
)
def test_kv_holds_what_runs_at_a_time(changes: list[str], size: int) -> None:
    recipe = load_recipe(TINY, changes)
    assert kv_cache_bytes(recipe, recipe.arch) == size
    assert engine_arguments(recipe, Path("model"), False, False)["kv_cache_memory_bytes"] == size
    assert "kv_cache_memory_bytes" not in engine_arguments(recipe, Path("model"), True, False)
