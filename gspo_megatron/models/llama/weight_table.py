"""The tensors of a Llama layer: Hugging Face's names and shapes, and the Megatron parameters they make up."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.llama.architecture import LlamaArchitecture
from gspo_megatron.models.trainer_cuts import Parameter, cut_columns, cut_gated_mlp, cut_qkv, whole
from gspo_megatron.parallel import Coordinates, Layout


def qkv_kinds(arch: Architecture) -> tuple[str, ...]:
    """What the projection of queries, keys and values has: a weight, and in Qwen2.5 a bias."""
    assert isinstance(arch, LlamaArchitecture)
    return ("weight", "bias") if arch.has_qkv_bias else ("weight",)


def layer_shapes(arch: Architecture, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and full shape of every Hugging Face tensor of a layer, in file order."""
    prefix, hidden, width = f"model.layers.{layer}.", arch.hidden_size, arch.intermediate_size
    heads = {"q": arch.num_attention_heads, "k": arch.num_key_value_heads, "v": arch.num_key_value_heads}
    for part, count in heads.items():
        for kind in qkv_kinds(arch):
            rows = count * arch.head_dim
            yield f"{prefix}self_attn.{part}_proj.{kind}", (rows, hidden) if kind == "weight" else (rows,)
    yield prefix + "self_attn.o_proj.weight", (hidden, arch.num_attention_heads * arch.head_dim)
    yield prefix + "mlp.gate_proj.weight", (width, hidden)
    yield prefix + "mlp.up_proj.weight", (width, hidden)
    yield prefix + "mlp.down_proj.weight", (hidden, width)
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)


def layer_parameters(arch: Architecture, layout: Layout, at: Coordinates, layer: int) -> Iterator[Parameter]:
    """What the rank at these coordinates holds of a layer, under Megatron's names."""
    name, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, tensor = arch.hidden_size, (at.tensor, layout.tensor)
    yield whole(name + "input_layernorm.weight", hf + "input_layernorm.weight", (hidden,))
    for kind in qkv_kinds(arch):
        yield cut_qkv(f"{name}self_attention.linear_qkv.{kind}", hf + "self_attn.", arch, *tensor, kind=kind)
    width = arch.num_attention_heads * arch.head_dim
    yield cut_columns(
        name + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", hidden, width, *tensor
    )
    yield whole(name + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", (hidden,))
    yield from cut_gated_mlp(name + "mlp.", hf + "mlp.", hidden, arch.intermediate_size, *tensor)
