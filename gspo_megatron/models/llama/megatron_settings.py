"""How megatron-core builds Llama and Qwen2.5."""

from __future__ import annotations

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.family import MegatronSettings
from gspo_megatron.models.llama.architecture import LlamaArchitecture
from gspo_megatron.models.rope import megatron_rope


def megatron_settings(arch: Architecture) -> MegatronSettings:
    """No norm of queries and keys; a bias of their projection in Qwen2.5, and no other."""
    assert isinstance(arch, LlamaArchitecture)
    transformer = {"qk_layernorm": False, "add_bias_linear": False, "add_qkv_bias": arch.has_qkv_bias}
    return MegatronSettings(transformer, *megatron_rope(arch))
