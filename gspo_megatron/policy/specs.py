"""Two layer specs, one model: Transformer Engine where it and a GPU are there, plain torch everywhere else."""

from __future__ import annotations

import importlib
import os
from functools import cache, partial
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from gspo_megatron.cluster.gpu_environment import replaced_settings, site_faults
from gspo_megatron.cluster.gpu_parts import cuda_fault, engine_fault
from gspo_megatron.cluster.machines import machine_of
from gspo_megatron.config.schema import Recipe
from gspo_megatron.policy.attention import ReferenceAttention
from gspo_megatron.policy.rotary import PackedSelfAttention

FUSES = "fuse_wgrad_accumulation"
"""Attribute of each of Transformer Engine's matrix products, which it reads at every forward pass."""


class ReferenceNorm(torch.nn.Module):
    """RMSNorm in plain torch: statistics in at least float32, its weight marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron reduces the gradients of marked parameters over the tensor-parallel ranks.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


@cache
def import_fault() -> str:
    """Why Transformer Engine cannot be imported, in some words; empty if it can."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    # Whatever a library raises that was compiled for another torch, or lacks one of its own.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine and a GPU to run it on are both there."""
    return torch.cuda.is_available() and not import_fault()


def refuse_fallbacks(recipe: Recipe) -> None:
    """Raise SystemExit with a sentence where a run that is placed on GPUs would train on the CPU, or unfused."""
    if machine_of(recipe).is_cpu:
        return
    starts = torch.cuda.is_available()
    fault = cuda_fault(starts, torch.__version__, torch.version.cuda) or engine_fault(import_fault())
    # Its own variables, set by the launcher, are in order; what the site adds may not be.
    fault = fault or next(site_faults(recipe, os.environ), "")
    if fault:
        raise SystemExit(f"trainer: {fault}")


def describe_parts() -> str:
    """Which fused parts compute and which fell back, in one sentence for the log."""
    adam = vars(optimizer)["Adam"].__module__.partition(".")[0]
    if has_transformer_engine():
        layers = "Transformer Engine: fused norm and linear, packed attention, grouped experts"
    else:
        missing = "Transformer Engine" if torch.cuda.is_available() else "a GPU"
        layers = f"plain torch for want of {missing}: attention and norms unfused, experts one after another"
    replaced = replaced_settings(os.environ)
    return f"layers by {layers}; AdamW by {adam}" + (f"; {replaced}" if replaced else "")


def transformer_engine_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of megatron-core with fused norm + linear, grouped experts and THD attention."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    layer: Any = spec.submodules
    layer.self_attention.module = PackedSelfAttention
    return spec


def fuse_accumulation(chunk: torch.nn.Module) -> int:
    """Let Transformer Engine's products add weight gradients to Megatron's float32 buffer; returns how many do.

    Otherwise the gradient of each micro-batch is rounded to the type of the weight before it is added.
    """
    products = [module for module in chunk.modules() if hasattr(module, FUSES)]
    for module in products:
        setattr(module, FUSES, True)
    return len(products)


def reference_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The same layer from megatron-core's parallel linears, `ReferenceNorm` and `ReferenceAttention`."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    # Any: the builder protocols of megatron-core name their parameters more strictly than its own modules do.
    attention: Any = ReferenceAttention
    bias_dropout: Any = get_bias_dropout_add
    normed: Any = ReferenceNorm if config.qk_layernorm else None
    mlp: Any = partial(MLP.as_mlp_submodule, submodules=linears)
    if config.num_moe_experts:
        mlp = partial(MoELayer, submodules=MoESubmodules(experts=partial(SequentialMLP, submodules=linears)))
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ReferenceNorm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=normed,
                    k_layernorm=normed,
                ),
            ),
            self_attn_bda=bias_dropout,
            pre_mlp_layernorm=ReferenceNorm,
            mlp=mlp,
            mlp_bda=bias_dropout,
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=ReferenceNorm)
