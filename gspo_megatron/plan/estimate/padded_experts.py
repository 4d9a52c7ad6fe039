"""Experts that vLLM's kernels pad on Blackwell: their width, the memory of the padding, and the work on it."""

from __future__ import annotations

from gspo_megatron.cluster.machines import BLACKWELL, Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.server_cuts import pad_experts
from gspo_megatron.types import ITEM_BYTES

UNPADDED = "triton"
"""Kernels of the experts that pad nothing (`rollout.vllm.moe_backend`)."""


def pads_experts(recipe: Recipe, machine: Machine) -> bool:
    """Whether vLLM takes kernels that pad experts (`pad_experts`).

    Source: its `fused_moe/oracle/unquantized.py`, and `make cuda-dry` at capabilities 9.0, 10.0 and 10.3. Those of fp8
    take whole blocks and pad nothing.
    """
    plain = recipe.rollout.weight_dtype is None and recipe.rollout.vllm.given().get("moe_backend") != UNPADDED
    return machine.device.kind in BLACKWELL and plain


def expert_widths(recipe: Recipe, arch: Architecture) -> tuple[int, int]:
    """Intermediate columns of an expert that a GPU of a server holds, and what those kernels make of them."""
    rollout = recipe.rollout
    width = arch.moe_intermediate_size // (1 if rollout.expert_parallel else rollout.tensor_parallel)
    return width, pad_experts(width)


def padded_share(recipe: Recipe, arch: Architecture, machine: Machine) -> float:
    """Columns of an expert that its kernel reads and multiplies, over those that hold weights; 1 without padding."""
    if not arch.num_experts or not pads_experts(recipe, machine):
        return 1.0
    width, padded = expert_widths(recipe, arch)
    return padded / width


def padding_bytes(recipe: Recipe, arch: Architecture, machine: Machine) -> int:
    """Bytes that padded experts take on one GPU of a server beyond their weights."""
    if not arch.num_experts or not pads_experts(recipe, machine):
        return 0
    rollout = recipe.rollout
    width, padded = expert_widths(recipe, arch)
    experts = -(-arch.num_experts // (rollout.tensor_parallel if rollout.expert_parallel else 1))
    layers = -(-arch.num_hidden_layers // rollout.pipeline_parallel)
    return 3 * arch.hidden_size * (padded - width) * experts * layers * ITEM_BYTES[recipe.model.dtype]
