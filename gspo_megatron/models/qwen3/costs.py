"""Matrix products and saved activations of a Qwen3 layer."""

from __future__ import annotations

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import layer_costs
from gspo_megatron.models.layer_costs import LayerShape


def layer_products(arch: Architecture) -> int:
    """Multiply-adds of one token: projections, router and chosen experts, or the dense feed-forward layer."""
    attention = layer_costs.attention_products(arch)
    if not arch.num_experts:
        return attention + layer_costs.gated_mlp_products(arch)
    router = arch.hidden_size * arch.num_experts
    return attention + router + arch.num_experts_per_tok * layer_costs.expert_products(arch)


def mixer_bytes(shape: LayerShape, spread: float) -> int:
    """Bytes that the feed-forward layer or the experts save."""
    experts = shape.arch.num_experts
    return layer_costs.experts_bytes(shape, spread) if experts else layer_costs.gated_mlp_bytes(shape)


def mixer_work(shape: LayerShape, spread: float) -> float:
    """Values that come and go in it."""
    experts = shape.arch.num_experts
    return layer_costs.experts_work(shape, spread) if experts else layer_costs.gated_mlp_work(shape)
