"""Arguments that stay at their library's default although others set them: who does, and why not here.

Shares of a step are planned, for the recipes of this repository; `recipes/NOTES.md` has them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

NEMO = "NeMo-RL: examples/configs/grpo_math_1B.yaml and recipes/llm/performance"
NEMO_FP8 = "NeMo-RL: docs, FP8 quantization"
BRIDGE = "Megatron-Bridge: scripts/performance/configs/qwen/qwen3_workload_base_configs.py"
SLIME = "slime: scripts/run-qwen3-30B-A3B.sh, run-qwen3-235B-A22B.sh"
VERL = "verl: examples/grpo_trainer/run_qwen3_235b_a22b_megatron.sh"


class Kept(NamedTuple):
    """Of one argument."""

    others: str
    """What published recipes and guides for these models do."""
    why: str
    source: str
    needs: Literal["", "experts", "context", "tensor", "unrounded"] = ""
    """What a run must have for the argument to matter."""


_OVERLAP = Kept(
    "Megatron-Bridge sets it for 235B on H100, not for 30B",
    "Megatron refuses it with full recomputation, with recomputed experts, and with stages that are not cut into "
    "chunks; at most 5 % of a step",
    BRIDGE,
    "experts",
)
_GRAPHS = Kept(
    "NeMo-RL captures attention and router on GB200, Megatron-Bridge the router on H100",
    "a graph has one shape, and packs differ; launches are at most 2 % of a step",
    NEMO,
)
_STATES = Kept(
    "NeMo-RL and slime set it; it takes 2 of 12 bytes off each parameter of a rank's share",
    "no layout becomes faster by it than 0.1 % of a step, and checkpoints do not read its states",
    SLIME,
)
_GATHER = Kept(
    "NeMo-RL sets it", "hides at most 0.1 % of a step, and weights are sent to the servers right after an update", NEMO
)

MEGATRON: Mapping[str, Kept] = {
    "overlap_grad_reduce": Kept(
        "NeMo-RL sets it",
        "hides at most 0.2 % of a step, and would end the leaving out of backward passes of clipped sequences",
        NEMO,
    ),
    "bucket_size": Kept("at its default too", "acts with overlap_grad_reduce", NEMO),
    "overlap_param_gather": _GATHER,
    "cp_comm_type": Kept(
        "at its default, a ring, too",
        "scores hide the ring; another kind takes at most 1 % off a step here, and `gspo plan --search` tries each",
        NEMO,
        "context",
    ),
    "moe_router_fusion": Kept(
        "Megatron-Core offers it since 0.14",
        "its kernel chooses without asking the record of choices, which replay and the experts' metrics need",
        "megatron-core: moe_utils.py, topk_routing_with_score_function",
        "experts",
    ),
    "overlap_moe_expert_parallel_comm": _OVERLAP,
    "delay_wgrad_compute": Kept(_OVERLAP.others, "acts with overlap_moe_expert_parallel_comm", BRIDGE, "experts"),
    "cuda_graph_impl": _GRAPHS,
    "tp_comm_overlap": Kept(
        "neither NeMo-RL nor slime sets it",
        "its buffers have one shape, and packs differ; at most 0.6 % of a step",
        NEMO,
        "tensor",
    ),
    "use_precision_aware_optimizer": _STATES,
    "optimizer_cpu_offload": Kept(
        "slime sets it, verl moves all states to the host between phases",
        "states move to the host while servers sample as it is; the layouts that the room would allow are at most "
        "1.4 % of a step faster, before Adam on the host",
        SLIME,
    ),
}  # fmt: skip

VLLM: Mapping[str, Kept] = {
    "quantization": Kept(
        "NeMo-RL samples in fp8 by a key, with a correction for it",
        "the sampler's log-probs would leave the trainer's, and GSPO as published has no correction; with one, "
        "`rollout.weight_dtype: fp8` takes 1 to 16 % off a step",
        NEMO_FP8,
        "unrounded",
    ),
    "kv_cache_dtype": Kept(
        "none of these recipes sets it",
        "the sampler's log-probs would leave the trainer's, and GSPO as published has no correction; with one, a step "
        "takes 7 to 27 % less",
        NEMO,
    ),
    "speculative_config": Kept(
        "slime proposes tokens by the multi-token heads of models that have some",
        "these models have none, and with tokens from repeated text vLLM's CPU build no longer reports the policy's "
        "log-probs (inference/NOTES.md)",
        SLIME,
    ),
    "max_num_batched_tokens": Kept(
        "NeMo-RL leaves it, verl takes 1,024 for 235B",
        "8,192 on an H100 (vLLM); prompts are read once for a group, and are less than 0.1 % of the sampling",
        VERL,
    ),
    "moe_backend": Kept(
        "at its default too", "vLLM chooses by GPU", "vLLM: fused_moe/oracle/unquantized.py", "experts"
    ),
    "enforce_eager": Kept("NeMo-RL keeps graphs too", "without graphs a step takes up to 57 % longer", NEMO),
    "optimization_level": Kept("at its default too", "O2: compiled, with full and piecewise graphs", NEMO),
    "cudagraph_capture_sizes": Kept(
        "slime lists 1 to 256", "vLLM's own list goes to twice rollout.max_concurrency, at most 512", SLIME
    ),
    "async_scheduling": Kept("at its default too", "vLLM 0.32 does so by itself where it can", "vLLM: config/vllm.py"),
}  # fmt: skip
