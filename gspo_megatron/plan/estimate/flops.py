"""Floating-point operations and parameter counts of a model in closed form. A multiply-add is two."""

from __future__ import annotations

import json
from functools import lru_cache

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import architecture_of
from gspo_megatron.models.hf_table import count_parameters
from gspo_megatron.models.layer_costs import expert_products
from gspo_megatron.models.registry import family_of


def as_key(arch: Architecture) -> str:
    """The shapes of a model as a key for caches: a big model has 36,000 tensors to walk."""
    return arch.model_dump_json(exclude={"rope_scaling"})


def parameters(arch: Architecture) -> int:
    """Parameters of the whole model, from the weight table."""
    return _parameters(as_key(arch))


@lru_cache(maxsize=32)
def _parameters(key: str) -> int:
    return count_parameters(architecture_of(json.loads(key)))


def active_parameters(arch: Architecture) -> int:
    """Parameters that one token meets: its own experts only, embedding and head included."""
    idle = (arch.num_experts - arch.num_experts_per_tok) * expert_parameters(arch) * arch.num_hidden_layers
    return parameters(arch) - idle


def expert_parameters(arch: Architecture) -> int:
    """Parameters of one expert of one layer."""
    return expert_products(arch)


def linear_flops(arch: Architecture) -> int:
    """Forward operations of one token in every matrix product but the attention scores, head included."""
    layers = arch.num_hidden_layers * family_of(arch).layer_products(arch)
    return 2 * (layers + arch.vocab_size * arch.hidden_size)


def mixer_flops(arch: Architecture) -> int:
    """The part of `linear_flops` that is spent in experts, or in the feed-forward layers of a dense model."""
    dense = 3 * arch.hidden_size * arch.intermediate_size
    chosen = arch.num_experts_per_tok * expert_parameters(arch) if arch.num_experts else dense
    return 2 * arch.num_hidden_layers * chosen


def quadratic_flops(arch: Architecture) -> int:
    """Forward operations of causal attention scores and their use, per token and token of length."""
    return 2 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim


def forward_flops(arch: Architecture, length: float) -> float:
    """Mean forward operations of a token in a sequence of this length."""
    return linear_flops(arch) + quadratic_flops(arch) * length


def attention_share(arch: Architecture, length: float) -> float:
    """Share of the quadratic part in `forward_flops`."""
    return quadratic_flops(arch) * length / forward_flops(arch, length)


def kv_bytes(arch: Architecture, element: int = 2) -> int:
    """Bytes of keys and values of one token over all layers."""
    return 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * element


def route_bytes(arch: Architecture) -> int:
    """Bytes of one token's recorded routes: one for each chosen expert of each layer, two above 255 experts."""
    return arch.num_hidden_layers * arch.num_experts_per_tok * (1 if arch.num_experts <= 255 else 2)
