"""How a trainer works: this one as a recipe tells it to; published runs of others with their ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.estimate.calibration import CALIBRATED, Rates


@dataclass(frozen=True, slots=True)
class Practice:
    """What the estimates assume of a trainer beyond its recipe."""

    dispatch: Literal["all_to_all", "fused", "overlapped"] = "all_to_all"
    """How tokens reach their experts: a copy per expert over NCCL; a copy per node and rank (DeepEP, HybridEP); the
    latter while other micro-batches are computed."""
    balanced: bool = False
    """Whether the router is forced to load all experts evenly."""
    overlaps_reduction: bool = False
    """Whether gradients are reduced during the last backward pass."""
    bucket: int | None = None
    """Parameters that one overlapped reduction covers; None = Megatron's usual number."""
    overlaps_gather: bool = False
    """Whether parameters are gathered during the first forward pass."""
    fuses_accumulation: bool = False
    """Whether products add gradients to the buffer themselves."""
    virtual: int = 0
    """Chunks of a stage, where this repository cannot cut the model so; 0 = as the recipe says."""
    gradient_bytes: int = 4
    """Bytes of a gradient in its buffer."""
    head_passes: float = 12
    """Times that the head reads or writes the float32 logits in a forward pass. Source: kernels of the H100 slice."""
    whole_logits: bool = False
    """Whether the head holds the logits of a micro-batch: in bfloat16, in float32, and their gradient."""
    packing: Literal["balanced", "first_fit"] = "balanced"
    """How sequences become micro-batches: so that ranks have equal work; or as many of the mean length as fit, where
    some rank's are long enough to fill it."""
    rates: Rates = CALIBRATED
    """Measured and fitted rates."""


OURS = Practice()
"""What servers do depends on none of this."""


def practice_of(recipe: Recipe) -> Practice:
    """Return what this trainer does under a recipe."""
    given = recipe.trainer.megatron.given()
    return Practice(
        dispatch="fused" if given.get("moe_token_dispatcher_type") == "flex" else "all_to_all",
        overlaps_reduction=bool(given.get("overlap_grad_reduce")),
        bucket=given.get("bucket_size"),
        fuses_accumulation=given.get("gradient_accumulation_fusion") is not False,
    )


def link_speed(machine: Machine, practice: Practice, inside: bool) -> float:
    """Bytes/s of a collective inside a node, or between nodes."""
    if inside:
        return machine.device.node_link * practice.rates.link_share
    return machine.device.network * practice.rates.network_share
