"""What each argument of `trainer.megatron` and `rollout.vllm` changes in the planned times and memory, if anything."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NOT_COUNTED = ""
"""The estimate does not know the argument's effect, and the plan says so where a recipe gives it."""

MEGATRON_EFFECTS: Mapping[str, str] = MappingProxyType({
    "attention_backend": NOT_COUNTED,
    "average_in_collective": NOT_COUNTED,
    "batch_p2p_sync": NOT_COUNTED,
    "bias_activation_fusion": NOT_COUNTED,
    "bias_dropout_fusion": NOT_COUNTED,
    "bucket_size": "the part of the last reduction that nothing hides, and the number of collectives",
    "cp_comm_type": "what context-parallel ranks send, whether scores hide it, and its buffers",
    "deterministic_mode": NOT_COUNTED,
    "disable_bf16_reduced_precision_matmul": NOT_COUNTED,
    "flash_attention_version": NOT_COUNTED,
    "gradient_accumulation_fusion": "time of an update for each parameter tensor",
    "hierarchical_context_parallel_sizes": "which ranks exchange heads, over which links",
    "high_priority_a2a_comm_stream": NOT_COUNTED,
    "moe_flex_dispatcher_backend": NOT_COUNTED,
    "moe_flex_dispatcher_num_sms": NOT_COUNTED,
    "moe_permute_fusion": NOT_COUNTED,
    "moe_token_dispatcher_type": "copies of a token on the wire, and sorting them by expert",
    "overlap_grad_reduce": "time of the reduction, which the last backward pass hides",
    "pad_buckets_for_high_nccl_busbw": NOT_COUNTED,
    "recompute_modules": "time that is repeated, and activations that are kept",
    "use_te_activation_func": NOT_COUNTED,
})  # fmt: skip

VLLM_EFFECTS: Mapping[str, str] = MappingProxyType({
    "async_scheduling": NOT_COUNTED,
    "attention_backend": NOT_COUNTED,
    "attention_config": NOT_COUNTED,
    "block_size": "tokens that num_gpu_blocks_override holds",
    "compilation_config": "cudagraph_mode=NONE: launches of a decoding step; no other field",
    "cudagraph_capture_sizes": "launches of a decoding step that no graph covers",
    "cudagraph_metrics": NOT_COUNTED,
    "dcp_comm_backend": NOT_COUNTED,
    "disable_cascade_attn": NOT_COUNTED,
    "disable_custom_all_reduce": NOT_COUNTED,
    "disable_log_stats": NOT_COUNTED,
    "distributed_timeout_seconds": NOT_COUNTED,
    "enable_batch_sharded_sampling": NOT_COUNTED,
    "enable_chunked_prefill": NOT_COUNTED,
    "enable_flashinfer_autotune": NOT_COUNTED,
    "enable_layerwise_nvtx_tracing": NOT_COUNTED,
    "enable_mfu_metrics": NOT_COUNTED,
    "enable_nccl_comm_suspend": NOT_COUNTED,
    "enforce_eager": "launches of a decoding step",
    "kernel_config": NOT_COUNTED,
    "kv_cache_dtype": "bytes of keys and values: responses that fit, and reading them",
    "linear_backend": NOT_COUNTED,
    "long_prefill_token_threshold": NOT_COUNTED,
    "max_cudagraph_capture_size": "launches of a decoding step that no graph covers",
    "max_num_batched_tokens": "memory that a step works in, and how often a prompt's steps read the weights",
    "moe_backend": "padding of experts on Blackwell: memory, reading, products",
    "num_gpu_blocks_override": "responses that fit",
    "numa_bind": NOT_COUNTED,
    "numa_bind_cpus": NOT_COUNTED,
    "numa_bind_nodes": NOT_COUNTED,
    "optimization_level": "O0: launches of a decoding step; no other level",
    "performance_mode": NOT_COUNTED,
    "prefix_caching_hash_algo": NOT_COUNTED,
    "scheduler_reserve_full_isl": NOT_COUNTED,
    "sleep_mode_offload_cudagraph": NOT_COUNTED,
    "use_fp64_gumbel": NOT_COUNTED,
})  # fmt: skip


def not_counted(effects: Mapping[str, str], given: Mapping[str, Any]) -> list[str]:
    """Which of the given arguments, and fields of them, the estimate knows nothing of.

    Args:
        effects: of one library.
        given: what the recipe gives of it.
    """
    found = [name for name in given if effects[name] == NOT_COUNTED]
    fields = given.get("compilation_config", {})
    found += [f"compilation_config.{name}" for name in fields if name != "cudagraph_mode"]
    if given.get("optimization_level", "O0") != "O0":
        found.append("optimization_level")
    return found
