"""Matrix products and saved activations of a Llama layer."""

from __future__ import annotations

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models import layer_costs
from gspo_megatron.models.layer_costs import LayerShape


def layer_products(arch: Architecture) -> int:
    """Multiply-adds of one token: projections and the dense feed-forward layer; a bias is not counted."""
    return layer_costs.attention_products(arch) + layer_costs.gated_mlp_products(arch)


def mixer_bytes(shape: LayerShape, spread: float) -> int:
    """Bytes that the feed-forward layer saves; no load is uneven."""
    return layer_costs.gated_mlp_bytes(shape)


def mixer_work(shape: LayerShape, spread: float) -> float:
    """Values that come and go in it."""
    return layer_costs.gated_mlp_work(shape)
