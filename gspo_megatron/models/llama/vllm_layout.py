"""The parameters of a Llama layer as vLLM's ranks hold them."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.llama.weight_table import qkv_kinds
from gspo_megatron.models.server_cuts import (
    ServerLayout,
    ServerParameter,
    hold_attention_output,
    hold_gated_mlp,
    hold_qkv,
    hold_whole,
)


def server_layer(
    arch: Architecture, layout: ServerLayout, layer: int, data: int, tensor: int
) -> Iterator[ServerParameter]:
    """What the rank at these places holds of a layer; data-parallel ranks of a dense model are copies."""
    prefix, hidden = f"model.layers.{layer}.", arch.hidden_size
    yield hold_whole(prefix + "input_layernorm.weight", (hidden,))
    yield hold_whole(prefix + "post_attention_layernorm.weight", (hidden,))
    yield from hold_qkv(arch, prefix + "self_attn.", layout, tensor, qkv_kinds(arch))
    yield hold_attention_output(arch, prefix + "self_attn.", layout, tensor)
    yield from hold_gated_mlp(arch, prefix + "mlp.", layout, tensor)
