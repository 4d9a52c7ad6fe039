"""Which arguments of Megatron and vLLM a recipe may pass on, and why it may not pass on the others.

An argument that is in none of these tables is refused too, so that a new release of a library adds none by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MEGATRON_KEYS: Mapping[str, str] = MappingProxyType({
    "attention_backend": "Kernels of the attention. Ours leaves the choice to Transformer Engine.",
    "average_in_collective": "Average gradients within their reduction instead of scaling them before it.",
    "batch_p2p_sync": "Synchronise after a batched exchange between pipeline stages.",
    "bias_activation_fusion": "One kernel for the gate, its activation and the product.",
    "bias_dropout_fusion": "One kernel for the residual addition.",
    "bucket_size": "Parameters that one reduction of gradients covers; acts with overlap_grad_reduce.",
    "cp_comm_type": "How context-parallel ranks meet: keys and values round a ring (p2p) or gathered (all_gather), or "
    "heads exchanged (a2a), or heads exchanged by consecutive ranks and a ring between these (a2a+p2p).",
    "deterministic_mode": "Only kernels that give equal bits for equal input.",
    "disable_bf16_reduced_precision_matmul": "Accumulate split matrix products in float32.",
    "flash_attention_version": "Version of flash-attention that Transformer Engine takes.",
    "gradient_accumulation_fusion": "Matrix products of Transformer Engine add weight gradients to the float32 buffer.",
    "hierarchical_context_parallel_sizes": "Of cp_comm_type=a2a+p2p: consecutive ranks that exchange heads, and "
    "how many such groups a ring connects.",
    "high_priority_a2a_comm_stream": "A stream of high priority for the exchange of tokens between experts.",
    "moe_flex_dispatcher_backend": "Library of the flex dispatcher, which has to be installed.",
    "moe_flex_dispatcher_num_sms": "Multiprocessors that the flex dispatcher takes.",
    "moe_permute_fusion": "Fused kernels that sort tokens by expert.",
    "moe_token_dispatcher_type": "How tokens reach their experts: NCCL's all-to-all, or flex (DeepEP, HybridEP).",
    "overlap_grad_reduce": "Reduce gradients while the last micro-batch is computed.",
    "pad_buckets_for_high_nccl_busbw": "Pad gradient buckets to sizes that NCCL is fast at.",
    "recompute_modules": "Parts of a layer that selective recomputation repeats.",
    "use_te_activation_func": "Activation by Transformer Engine.",
})  # fmt: skip
"""Settings of speed and memory, and what each does."""

VLLM_KEYS: Mapping[str, str] = MappingProxyType({
    "async_scheduling": "Schedule the next step while the present one is computed.",
    "attention_backend": "Kernels of the attention.",
    "attention_config": "Further settings of the attention.",
    "block_size": "Tokens of a block of the KV cache.",
    "compilation_config": "torch.compile and CUDA graphs.",
    "cudagraph_capture_sizes": "Batch sizes for which CUDA graphs are captured.",
    "cudagraph_metrics": "Log which graphs were used.",
    "dcp_comm_backend": "How decode-context-parallel ranks combine their attention.",
    "disable_cascade_attn": "Compute the attention over a shared prefix for each sequence.",
    "disable_custom_all_reduce": "NCCL instead of vLLM's own all-reduce.",
    "disable_log_stats": "No statistics in the log.",
    "distributed_timeout_seconds": "Longest wait of a collective, seconds.",
    "enable_batch_sharded_sampling": "Sample on every tensor-parallel rank a share of the batch.",
    "enable_chunked_prefill": "Cut long prompts into chunks.",
    "enable_flashinfer_autotune": "Measure FlashInfer's kernels at start.",
    "enable_layerwise_nvtx_tracing": "Ranges of each layer for a profiler.",
    "enable_mfu_metrics": "Log the share of the peak FLOP/s.",
    "enable_nccl_comm_suspend": "Free the memory of NCCL while the server sleeps.",
    "enforce_eager": "No CUDA graphs.",
    "kernel_config": "Further choices of kernels.",
    "kv_cache_dtype": "Type of the KV cache. fp8 holds twice the tokens and changes the sampler's log-probs.",
    "linear_backend": "Kernels of the matrix products.",
    "long_prefill_token_threshold": "Prompt tokens from which a request counts as long.",
    "max_cudagraph_capture_size": "Largest batch size for which a CUDA graph is captured.",
    "max_num_batched_tokens": "Tokens that one engine step takes in.",
    "moe_backend": "Kernels of the experts.",
    "num_gpu_blocks_override": "Blocks of the KV cache, instead of what the memory holds.",
    "numa_bind": "Bind workers to the processor of their GPU.",
    "numa_bind_cpus": "Processors of each worker.",
    "numa_bind_nodes": "Memory node of each worker.",
    "optimization_level": "vLLM's preset of compilation.",
    "performance_mode": "vLLM's preset for latency or throughput.",
    "prefix_caching_hash_algo": "Hash of the prefix cache.",
    "scheduler_reserve_full_isl": "Admit a request only when its whole prompt fits.",
    "sleep_mode_offload_cudagraph": "Free the memory of CUDA graphs while the server sleeps.",
    "use_fp64_gumbel": "Draw samples with noise in float64.",
})  # fmt: skip

ACT_ON_CPU = frozenset({
    "batch_p2p_sync", "bucket_size", "cp_comm_type", "deterministic_mode", "hierarchical_context_parallel_sizes",
    "overlap_grad_reduce", "recompute_modules",
    "async_scheduling", "block_size", "disable_log_stats", "max_num_batched_tokens", "num_gpu_blocks_override",
})  # fmt: skip
"""Those that do something where there is no GPU."""

NARROWED: Mapping[str, tuple[str, ...]] = MappingProxyType({
    # allgather takes packs of one length only.
    "moe_token_dispatcher_type": ("alltoall", "flex"),
    "cp_comm_type": ("p2p", "all_gather", "a2a", "a2a+p2p"),
    # Those that take weights as they are sent.
    "moe_backend": ("auto", "triton", "batched_triton", "flashinfer_trtllm", "flashinfer_cutlass"),
    "recompute_modules": ("core_attn", "layernorm", "mlp", "moe", "moe_act"),
    "kv_cache_dtype": ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
})  # fmt: skip
"""Values of a key that this package can run, where the library takes more."""

_OWNED_MEGATRON = {
    "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas", "adam_eps": "optimizer.eps",
    "bf16": "model.dtype", "clip_grad": "optimizer.clip_grad", "context_parallel_size": "trainer.context_parallel",
    "expert_model_parallel_size": "trainer.expert_parallel",
    "expert_tensor_parallel_size": "trainer.expert_tensor_parallel", "fp16": "model.dtype", "lr": "optimizer.lr",
    "min_lr": "optimizer.final_fraction", "moe_aux_loss_coeff": "trainer.aux_loss_coefficient",
    "moe_layer_recompute": "trainer.recompute", "moe_router_load_balancing_type": "trainer.aux_loss_coefficient",
    "num_layers_in_first_pipeline_stage": "trainer.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "trainer.last_stage_layers", "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype", "pipeline_model_parallel_size": "trainer.pipeline_parallel",
    "recompute_granularity": "trainer.recompute", "sequence_parallel": "trainer.tensor_parallel",
    "tensor_model_parallel_size": "trainer.tensor_parallel",
    "use_distributed_optimizer": "trainer.distributed_optimizer",
    "virtual_pipeline_model_parallel_size": "trainer.virtual_pipeline", "weight_decay": "optimizer.weight_decay",
    "cpu_offloading": "trainer.offload_activations",
    "fine_grained_activation_offloading": "trainer.offload_activations",
    "offload_modules": "trainer.offload_activations",
}  # fmt: skip
_OWNED_VLLM = {
    "data_parallel_size": "rollout.servers", "decode_context_parallel_size": "rollout.decode_context_parallel",
    "dtype": "model.dtype", "enable_expert_parallel": "rollout.expert_parallel",
    "enable_prefix_caching": "rollout.prefix_caching", "enable_return_routed_experts": "objective.replay",
    "enable_sleep_mode": "placement.rollout_nodes",
    "gpu_memory_utilization": "rollout.gpu_memory_fraction", "hf_config_path": "model.path",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib", "max_model_len": "rollout.max_answer_tokens",
    "max_num_seqs": "rollout.max_concurrency", "model": "model.path", "nnodes": "placement.server_nodes",
    "pipeline_parallel_size": "rollout.pipeline_parallel", "quantization": "rollout.weight_dtype",
    "quantization_config": "rollout.weight_dtype", "seed": "run.seed",
    "stream_interval": "rollout.stream_interval", "tensor_parallel_size": "rollout.tensor_parallel",
    "tokenizer": "tokenizer.path",
}  # fmt: skip

_UNFIT_MEGATRON = {
    "is decided by the model's config.json": (
        "activation_func add_bias_linear add_qkv_bias ffn_hidden_size gated_linear_unit hidden_size kv_channels "
        "layernorm_epsilon moe_ffn_hidden_size moe_router_pre_softmax moe_router_score_function moe_router_topk "
        "normalization num_attention_heads num_layers num_moe_experts num_query_groups qk_layernorm rotary_interleaved "
        "window_size"
    ),
    "would change the objective: the loss, its divisor or the gradient": (
        "attention_dropout calculate_per_token_loss grad_reduce_in_fp32 grad_scale_func gradient_reduce_div_fusion "
        "hidden_dropout moe_expert_capacity_factor moe_input_jitter_eps moe_pad_expert_input_to_capacity "
        "moe_router_enable_expert_bias moe_router_force_biased moe_router_force_load_balancing moe_token_drop_policy "
        "moe_token_dropping moe_z_loss_coeff mtp_num_layers optimizer qk_clip"
    ),
    "computes in fewer bits than the log-probs of the objective are checked for": (
        "fp4 fp4_param fp8 fp8_dot_product_attention fp8_param fp8_param_gather fp8_recipe moe_router_dtype"
    ),
    "bypasses the router's record of choices, from which replay and the metrics of the experts are made": (
        "moe_router_fusion"
    ),
    "acts on Apex's norms, and the layers here have Transformer Engine's": "memory_efficient_layer_norm",
    "is chosen by the model: the fused kernel silently loses YaRN's factor": "apply_rope_fusion",
    "needs micro-batches of one shape, and packs differ": (
        "cuda_graph_impl cuda_graph_modules cuda_graph_scope enable_cuda_graph external_cuda_graph tp_comm_overlap"
    ),
    "needs a schedule of two micro-batches at a time, which this trainer does not have, and which Megatron refuses "
    "with full recomputation, recomputed experts, and stages of one chunk": (
        "delay_wgrad_compute ep_overlap_early_attn_memory_release overlap_dispatch_backward_with_experts_wgrad "
        "overlap_moe_expert_parallel_comm"
    ),
    "leaves weights to be gathered later, and they are sent to the servers right after an update": (
        "align_param_gather overlap_param_gather overlap_param_gather_with_optimizer_step"
    ),
    "keeps states that checkpoints and the offload to the host do not read": (
        "exp_avg_dtype exp_avg_sq_dtype main_grads_dtype main_params_dtype optimizer_cpu_offload "
        "optimizer_offload_fraction store_param_remainders use_precision_aware_optimizer"
    ),
    "is not planned: full recomputation here repeats every layer from its input, and the memory estimate and its "
    "refusals would not hold": "recompute_method recompute_num_layers",
    "cuts the weights otherwise than the weight table": (
        "moe_single_grouped_weight pipeline_model_parallel_layout use_custom_fsdp use_megatron_fsdp "
        "use_transformer_engine_op_fuser"
    ),
}
_UNFIT_VLLM = {
    "acts between the data-parallel ranks of an engine, and a server here is an engine with one such rank": (
        "all2all_backend"
    ),
    "would change what is sampled or the log-probs that are reported": (
        "generation_config hf_overrides logits_processors logprobs_mode override_generation_config watermark_config"
    ),
    "proposes tokens, and on vLLM's CPU build what is then sampled and reported is not the policy's "
    "(inference/NOTES.md)": "speculative_config",
    "cuts or moves the weights otherwise than the transfer plan": (
        "cpu_offload_gb enable_elastic_ep enable_eplb enable_lora expert_placement_strategy load_format model_impl "
        "offload_backend"
    ),
    "would keep KV of old weights across an update": "kv_offloading_backend kv_offloading_size kv_transfer_config",
    "belongs to the weight update": "weight_transfer_config worker_cls worker_extension_cls",
}

CHANGES = "would change what is computed, or has no effect in this package"
"""Why any other argument of a library is refused."""


def refused_keys(engine: str, names: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """What is wrong with, and what to do instead of, each argument that a recipe may not pass on.

    Args:
        engine: `megatron` or `vllm`.
        names: the arguments of the library.
    """
    allowed, owned, unfit = (
        (MEGATRON_KEYS, _OWNED_MEGATRON, _UNFIT_MEGATRON)
        if engine == "megatron"
        else (VLLM_KEYS, _OWNED_VLLM, _UNFIT_VLLM)
    )
    reasons = {name: reason for reason, listed in unfit.items() for name in listed.split()}
    refused = {}
    for name in names:
        if name in owned:
            refused[name] = ("is set by another key of the recipe", f"use {owned[name]}")
        elif name not in allowed:
            refused[name] = (reasons.get(name, CHANGES), "leave it out")
    return refused


def named_keys(engine: str) -> set[str]:
    """Every argument that a table of this module names, for the test that each exists."""
    owned, unfit = (_OWNED_MEGATRON, _UNFIT_MEGATRON) if engine == "megatron" else (_OWNED_VLLM, _UNFIT_VLLM)
    return set(owned) | {name for listed in unfit.values() for name in listed.split()}
