"""Why this package sets an argument of Megatron or vLLM otherwise than the library, and where that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Reason(NamedTuple):
    """Of one argument."""

    why: str
    source: str


_SHAPE = Reason("shape of the model", "its config.json")
_LAYOUT = Reason("parallel layout", "recipe: trainer")
_DTYPE = Reason("type of the weights; log-probs, router and gradients stay float32", "recipe: model.dtype")
_NO_DROPOUT = Reason("ratios are 1 before the first update", "GSPO, 2507.18071, equation 5")
_ADAM = Reason("AdamW as the recipe says", "recipe: optimizer")
_MODEL_NAMES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon "
    "qk_layernorm add_qkv_bias add_bias_linear normalization gated_linear_unit activation_func num_moe_experts "
    "moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_router_score_function rotary_interleaved"
)
_LAYOUT_NAMES = (
    "tensor_model_parallel_size sequence_parallel context_parallel_size pipeline_model_parallel_size "
    "virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout "
    "expert_model_parallel_size expert_tensor_parallel_size"
)

MEGATRON: Mapping[str, Reason] = {
    **dict.fromkeys(_MODEL_NAMES.split(), _SHAPE),
    **dict.fromkeys(_LAYOUT_NAMES.split(), _LAYOUT),
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16"), _DTYPE),
    **dict.fromkeys(("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"), _ADAM),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), _NO_DROPOUT),
    "variable_seq_lengths": Reason("packs differ in length", "megatron-core: pipeline_parallel/p2p_communication.py"),
    "perform_initialization": Reason("every weight is loaded", "policy/weights.py refuses a missing one"),
    "bias_activation_fusion": Reason("one kernel for gate, activation and product", "megatron-core: usual settings"),
    "bias_dropout_fusion": Reason("one kernel for the residual addition", "megatron-core: usual settings"),
    "apply_rope_fusion": Reason(
        "no loop over sequences; off with YaRN, which the kernel loses, and with packs that fewer ranks share",
        "policy/rotary.py",
    ),
    "gradient_accumulation_fusion": Reason(
        "weight gradients of a micro-batch are not rounded to bfloat16", "Transformer Engine: fuse_wgrad_accumulation"
    ),
    "deallocate_pipeline_outputs": Reason("frees what a stage has sent", "megatron-core: usual settings"),
    "overlap_p2p_comm": Reason("interleaved stages send while they compute", "Megatron-LM, 2104.04473, section 2.2"),
    "batch_p2p_comm": Reason("the batched order swaps tensors of two interleaved stages", "policy/NOTES.md"),
    "moe_token_dispatcher_type": Reason(
        "packs differ in length, which allgather refuses; flex needs DeepEP or HybridEP, which the pins do not have, "
        "and is then 1 to 3 % of a step faster", "megatron-core; NeMo-RL and slime take alltoall on H100"
    ),
    "moe_router_dtype": Reason("a tie of bfloat16 would choose another expert", "Qwen3-MoE; policy/NOTES.md"),
    "moe_router_load_balancing_type": Reason("no balancing loss in reinforcement learning", "plan: aux-loss-on"),
    "moe_aux_loss_coeff": Reason("balancing loss as the recipe says", "recipe: trainer.aux_loss_coefficient"),
    "moe_grouped_gemm": Reason("one kernel for all experts of a rank", "megatron-core: MoE guide"),
    "moe_permute_fusion": Reason("fused sorting of tokens by expert", "megatron-core: MoE guide"),
    "recompute_granularity": Reason("saves activations", "recipe: trainer.recompute"),
    "recompute_method": Reason("every layer is recomputed from its input", "recipe: trainer.recompute"),
    "recompute_num_layers": Reason("every layer is recomputed from its input", "recipe: trainer.recompute"),
    "recompute_modules": Reason("experts only: the attention kernel repeats its scores itself", "policy/NOTES.md"),
    "calculate_per_token_loss": Reason("the loss has its denominators already", "objective/README.md"),
    "masked_softmax_fusion": Reason("the attention kernel masks", "policy/attention.py"),
    "overlap_grad_reduce": Reason("it keeps backward passes of clipped sequences", "recipes/NOTES.md"),
    "optimizer": Reason("AdamW", "policy/optimizer.py"),
    "grad_reduce_in_fp32": Reason("sums over ranks and micro-batches in float32", "Megatron-LM's default for bfloat16"),
    "use_distributed_optimizer": Reason("states spread over the replicas", "recipe: trainer.distributed_optimizer"),
}  # fmt: skip

_RECIPE = {
    "dtype": "model.dtype", "seed": "run.seed", "tensor_parallel_size": "rollout.tensor_parallel",
    "pipeline_parallel_size": "rollout.pipeline_parallel",
    "decode_context_parallel_size": "rollout.decode_context_parallel", "max_num_seqs": "rollout.max_concurrency",
    "stream_interval": "rollout.stream_interval", "enable_prefix_caching": "rollout.prefix_caching",
    "enable_expert_parallel": "rollout.expert_parallel", "gpu_memory_utilization": "rollout.gpu_memory_fraction",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
}  # fmt: skip
VLLM: Mapping[str, Reason] = {
    **{name: Reason("as the recipe says", f"recipe: {key}") for name, key in _RECIPE.items()},
    "model": Reason("config.json of the run", "run directory"),
    "served_model_name": Reason("name of the model in requests", "models/vllm_engine.py"),
    "max_model_len": Reason("longest prompt and response", "recipe: rollout.max_prompt_tokens, max_answer_tokens"),
    "load_format": Reason("the weights come with the first update", "inference/README.md"),
    "skip_tokenizer_init": Reason("token ids in, token ids out", "inference/README.md"),
    "generation_config": Reason("a file of the model would become the sampler", "vLLM: generation_config=auto"),
    "logprobs_mode": Reason("log-probs at the sampling temperature, as the trainer's", "vLLM: logprobs_mode"),
    "hf_overrides": Reason(
        "logits in float32, as the trainer's, and matrices as rollout.weight_dtype says", "inference/NOTES.md"
    ),
    "worker_extension_cls": Reason("weight update", "transport/README.md"),
    "weight_transfer_config": Reason("weight update from shard to shard", "transport/README.md"),
    "enable_return_routed_experts": Reason("its experts are chosen again", "recipe: objective.replay"),
    "enable_sleep_mode": Reason("servers share the trainer's GPUs", "recipe: placement.rollout_nodes"),
    "enforce_eager": Reason("no graphs without a GPU", "vLLM's CPU build"),
    "enable_chunked_prefill": Reason("vLLM's CPU build ends on a seeded prompt in chunks", "models/vllm_engine.py"),
    "max_num_batched_tokens": Reason("a prompt is taken in one step", "models/vllm_engine.py"),
}  # fmt: skip
