"""The tensors of a Qwen3 layer: Hugging Face's names and shapes, and the Megatron parameters they make up."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.trainer_cuts import Parameter, cut_columns, cut_gated_mlp, cut_qkv, whole
from gspo_megatron.parallel import Coordinates, Layout


def layer_shapes(arch: Architecture, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and full shape of every Hugging Face tensor of a layer, in file order."""
    prefix, hidden, head = f"model.layers.{layer}.", arch.hidden_size, arch.head_dim
    attention = prefix + "self_attn."
    yield attention + "q_proj.weight", (arch.num_attention_heads * head, hidden)
    yield attention + "k_proj.weight", (arch.num_key_value_heads * head, hidden)
    yield attention + "v_proj.weight", (arch.num_key_value_heads * head, hidden)
    yield attention + "o_proj.weight", (hidden, arch.num_attention_heads * head)
    yield attention + "q_norm.weight", (head,)
    yield attention + "k_norm.weight", (head,)
    if arch.num_experts:
        yield prefix + "mlp.gate.weight", (arch.num_experts, hidden)
    for mlp, width in _mlps(arch, prefix):
        yield mlp + "gate_proj.weight", (width, hidden)
        yield mlp + "up_proj.weight", (width, hidden)
        yield mlp + "down_proj.weight", (hidden, width)
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)


def _mlps(arch: Architecture, prefix: str) -> Iterator[tuple[str, int]]:
    """Prefix and width of every feed-forward layer: one, or one for each expert."""
    if not arch.num_experts:
        yield prefix + "mlp.", arch.intermediate_size
    for expert in range(arch.num_experts):
        yield f"{prefix}mlp.experts.{expert}.", arch.moe_intermediate_size


def layer_parameters(arch: Architecture, layout: Layout, at: Coordinates, layer: int) -> Iterator[Parameter]:
    """What the rank at these coordinates holds of a layer, under Megatron's names."""
    name, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, head, tensor = arch.hidden_size, (arch.head_dim,), (at.tensor, layout.tensor)
    yield whole(name + "input_layernorm.weight", hf + "input_layernorm.weight", (hidden,))
    yield cut_qkv(name + "self_attention.linear_qkv.weight", hf + "self_attn.", arch, *tensor)
    yield whole(name + "self_attention.q_layernorm.weight", hf + "self_attn.q_norm.weight", head)
    yield whole(name + "self_attention.k_layernorm.weight", hf + "self_attn.k_norm.weight", head)
    width = arch.num_attention_heads * arch.head_dim
    yield cut_columns(
        name + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", hidden, width, *tensor
    )
    yield whole(name + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", (hidden,))
    if not arch.num_experts:
        yield from cut_gated_mlp(name + "mlp.", hf + "mlp.", hidden, arch.intermediate_size, *tensor)
        return
    yield whole(name + "mlp.router.weight", hf + "mlp.gate.weight", (arch.num_experts, hidden))
    per_rank = arch.num_experts // layout.expert
    for expert in range(at.expert * per_rank, (at.expert + 1) * per_rank):
        yield from cut_gated_mlp(
            f"{name}mlp.experts.{expert}.", f"{hf}mlp.experts.{expert}.", hidden, arch.moe_intermediate_size,
            at.expert_tensor, layout.expert_tensor, expert=True,
        )  # fmt: skip
