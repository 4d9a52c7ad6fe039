"""How megatron-core builds Qwen3."""

from __future__ import annotations

from typing import Any

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.family import MegatronSettings
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.models.rope import megatron_rope


def megatron_settings(arch: Architecture) -> MegatronSettings:
    """Normed queries and keys, no bias, YaRN where the model has it."""
    assert isinstance(arch, Qwen3Architecture)
    transformer = {"qk_layernorm": True, "add_bias_linear": False, **(_router(arch) if arch.num_experts else {})}
    return MegatronSettings(transformer, *megatron_rope(arch))


def _router(arch: Qwen3Architecture) -> dict[str, Any]:
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        # Top-k of the logits, then softmax over the chosen: equal to Hugging Face's softmax, top-k, renormalise.
        "moe_router_pre_softmax": not arch.norm_topk_prob,
    }
