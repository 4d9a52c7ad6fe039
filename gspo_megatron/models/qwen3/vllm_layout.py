"""The parameters of a Qwen3 layer as vLLM's ranks hold them."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.server_cuts import (
    ServerLayout,
    ServerParameter,
    ServerPiece,
    hold_attention_output,
    hold_gated_mlp,
    hold_qkv,
    hold_whole,
    share_of,
)


def server_layer(
    arch: Architecture, layout: ServerLayout, layer: int, data: int, tensor: int
) -> Iterator[ServerParameter]:
    """What the rank at these places holds of a layer."""
    prefix, hidden = f"model.layers.{layer}.", arch.hidden_size
    attention = prefix + "self_attn."
    yield hold_whole(prefix + "input_layernorm.weight", (hidden,))
    yield hold_whole(prefix + "post_attention_layernorm.weight", (hidden,))
    yield hold_whole(attention + "q_norm.weight", (arch.head_dim,))
    yield hold_whole(attention + "k_norm.weight", (arch.head_dim,))
    yield from hold_qkv(arch, attention, layout, tensor)
    yield hold_attention_output(arch, attention, layout, tensor)
    if arch.num_experts:
        yield hold_whole(prefix + "mlp.gate.weight", (arch.num_experts, hidden))
        yield from _experts(arch, layout, prefix + "mlp.experts.", data * layout.tensor + tensor)
    else:
        yield from hold_gated_mlp(arch, prefix + "mlp.", layout, tensor)


def _experts(arch: Architecture, layout: ServerLayout, prefix: str, index: int) -> Iterator[ServerParameter]:
    """w13 [experts, 2 * width, hidden]: gate over up; w2 [experts, hidden, width]; padding is behind each part."""
    ranks, hidden = layout.tensor * layout.data, arch.hidden_size
    experts, width, slot = range(arch.num_experts), arch.moe_intermediate_size, 0
    if layout.expert_parallel:
        # The first ranks take a remainder.
        least, rest = divmod(arch.num_experts, ranks)
        start = index * least + min(index, rest)
        experts = range(start, start + least + (index < rest))
    else:
        width, slot = share_of(width, ranks, "moe_intermediate_size"), index
    rows = (slot * width, (slot + 1) * width)
    padded = layout.expert_width or width
    gate_up = tuple(
        ServerPiece(f"{prefix}{expert}.{part}_proj.weight", rows, (0, hidden), (place, half * padded, 0))
        for place, expert in enumerate(experts)
        for half, part in enumerate(("gate", "up"))
    )
    down = tuple(
        ServerPiece(f"{prefix}{expert}.down_proj.weight", (0, hidden), rows, (place, 0, 0))
        for place, expert in enumerate(experts)
    )
    yield ServerParameter(f"{prefix}routed_experts.w13_weight", (len(experts), 2 * padded, hidden), gate_up)
    yield ServerParameter(f"{prefix}routed_experts.w2_weight", (len(experts), hidden, padded), down)
