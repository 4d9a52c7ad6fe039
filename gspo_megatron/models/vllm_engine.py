"""The arguments of vLLM's `EngineArgs` as plain values: the server writes them as options, the plan explains them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.weight_format import form_of, quantization_config
from gspo_megatron.types import ITEM_BYTES

BACKEND = "gspo"
"""Name of the package's weight transfer in vLLM."""
MODEL_NAME = "policy"
"""What the servers call the model."""
MIN_STEP_TOKENS = 8192
"""Prompt tokens that one engine step takes in where there is no GPU."""
GIB = 1 << 30
CPU_BLOCK = 128
"""Tokens of a block of the KV cache where there is no GPU, in vllm 0.32."""
RECORDS = "enable_return_routed_experts"
"""Argument with which a server records the experts that its routers choose."""


def engine_arguments(recipe: Recipe, model: Path, has_gpu: bool, sleeps: bool, loaded: bool = False) -> dict[str, Any]:
    """Arguments of `EngineArgs` for one server.

    Args:
        recipe: the run.
        model: directory with `config.json`.
        has_gpu: whether the server runs on one.
        sleeps: whether it frees its GPU while the trainer works.
        loaded: whether the weights are those in `model`; without, they are random until the first update.
    """
    rollout = recipe.rollout
    ours = {
        "model": str(model),
        "served_model_name": MODEL_NAME,
        "dtype": recipe.model.dtype,
        "seed": recipe.run.seed,
        "tensor_parallel_size": rollout.tensor_parallel,
        "pipeline_parallel_size": rollout.pipeline_parallel,
        "decode_context_parallel_size": rollout.decode_context_parallel,
        "max_model_len": rollout.max_sequence_tokens,
        "max_num_seqs": rollout.max_concurrency,
        "stream_interval": rollout.stream_interval,
        "load_format": "safetensors" if loaded else "dummy",
        "skip_tokenizer_init": True,
        # A model directory's generation_config would silently become the sampler.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        # The trainer's logits are float32; by default vLLM rounds its own to the model's type.
        "hf_overrides": {
            "head_dtype": "float32",
            **({"quantization_config": quantization_config()} if form_of(recipe).fp8 and not loaded else {}),
        },
        "enable_prefix_caching": rollout.prefix_caching,
        "enable_expert_parallel": rollout.expert_parallel,
        RECORDS: recipe.objective.replay == "sampler" and not loaded,
        "worker_extension_cls": "gspo_megatron.inference.vllm_worker.WorkerExtension",
        "weight_transfer_config": {"backend": BACKEND},
        **_device_arguments(recipe, has_gpu, sleeps and not loaded),
    }
    return ours | recipe.rollout.vllm.given()


def kv_cache_bytes(recipe: Recipe, arch: Architecture) -> int:
    """KV cache of one server without a GPU, in bytes: vLLM takes all of it at its start."""
    rollout = recipe.rollout
    if rollout.kv_cache_gib is not None:
        return int(rollout.kv_cache_gib * GIB)
    size = rollout.vllm.given().get("block_size") or CPU_BLOCK
    # As much again for prompts that are kept; one block is vLLM's own.
    blocks = 2 * rollout.max_concurrency * -(-rollout.max_sequence_tokens // size) + 1
    token = 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * ITEM_BYTES[recipe.model.dtype]
    return min(blocks * size * token, GIB)


def _device_arguments(recipe: Recipe, has_gpu: bool, sleeps: bool) -> dict[str, Any]:
    rollout = recipe.rollout
    if has_gpu:
        return {"gpu_memory_utilization": rollout.gpu_memory_fraction, "enable_sleep_mode": sleeps}
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_cache_bytes(recipe, recipe.arch),
        # vllm 0.32 dies on a seeded request whose prompt is cut into chunks ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MIN_STEP_TOKENS, rollout.max_sequence_tokens),
    }


def to_options(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments on vLLM's command line, in which a mapping is JSON and a list is several words."""
    words = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list | tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return words
