"""Operations and seconds of a training step, from stated rates: an estimate, good for comparing and for orders of size."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.model import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan import flops
from gspo_megatron.plan.batch import BatchPlan
from gspo_megatron.plan.layout import spans
from gspo_megatron.plan.machine import Machine
from gspo_megatron.plan.memory import StageMemory
from gspo_megatron.plan.rollout import RolloutPlan
from gspo_megatron.weights.layout import Layout

LINEAR_SHARE = 0.40
"""Of the peak, matrix products of attention, experts and head. NVIDIA's trainer reaches 0.30 of it on this model with
communication included (30B-A3B, bfloat16, 16 H100, 4K tokens)."""
ATTENTION_SHARE = 0.55
"""Of the peak, attention kernels on long sequences, forward and backward together."""
IMBALANCE = 1.15
"""Slowest rank over the mean: micro-batches of unequal length, experts of unequal load."""
LENGTH_SPREAD = 1.5
"""Mean of the squared length over the square of the mean; answers of one batch are that unequal."""
EXCHANGE_SHARE = 0.7
"""Of a link's bytes/s, in collectives."""
HOST_LINK = 55e9
"""Bytes/s between a GPU and pinned host memory."""
UPDATE_SHARE = 0.3
"""Of the network, in a weight update: published ones take 2 to 6 times the ideal."""


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """Work and time of one rollout batch."""

    linear_flops_per_token: int
    """Forward, without attention scores."""
    quadratic_flops_per_token: float
    """Forward, attention scores at the mean length."""
    attention_share_at_mean: float
    """Share of the quadratic part at the mean length."""
    attention_share_at_limit: float
    """The same for a sequence at the limit."""
    forward_equivalents: float
    """Forward passes that the trainer spends on each token: old log-probs, forward, backward as two, recomputation."""
    flops_per_step: float
    """Of the trainer, all ranks."""
    seconds: dict[str, float]
    """Time of one step by part."""
    seconds_per_step: float
    """Sum of the parts, or the longer side where rollout and training overlap."""
    bottleneck: str
    """The longest part."""
    tokens_per_device_second: float
    """Trained tokens a second and GPU of the whole job."""
    device_hours: float
    """GPU-hours of `trainer.max_steps` steps."""
    hours: float
    """Hours of `trainer.max_steps` steps."""


def plan_compute(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    batch: BatchPlan,
    rollout: RolloutPlan,
    stages: list[StageMemory],
    machine: Machine,
) -> ComputePlan:
    """Operations of a step and seconds of its parts."""
    long = batch.expected_tokens * LENGTH_SPREAD
    tokens = batch.expected_tokens_per_batch
    linear, quadratic = flops.linear_flops(arch), flops.quadratic_flops(arch) * long
    again = _recomputed(recipe, arch)
    scoring = 2.0 if recipe.objective.kl != "none" else 1.0
    spent = {"old log-probs": scoring, "training": 3.0}
    work = (linear + quadratic) * (scoring + 3.0) + linear * again[0] + quadratic * again[1]
    seconds = {"rollout": rollout.seconds}
    for part, passes in spent.items():
        extra = again if part == "training" else (0.0, 0.0)
        amount = (linear * (passes + extra[0]), quadratic * (passes + extra[1]))
        seconds[part] = _train_seconds(recipe, arch, layout, batch, machine, amount, passes + extra[0])
    seconds["weight update"] = _update_seconds(recipe, rollout, stages, machine)
    if recipe.evaluation.every:
        asked = recipe.evaluation.problems * recipe.evaluation.answers / batch.sequences
        seconds["evaluation"] = rollout.seconds * asked / recipe.evaluation.every
    total = sum(seconds.values())
    if recipe.rollout.max_staleness and not machine.colocated:
        trainer = seconds["old log-probs"] + seconds["training"]
        total -= min(trainer, seconds["rollout"])
    return ComputePlan(
        linear_flops_per_token=linear,
        quadratic_flops_per_token=quadratic,
        attention_share_at_mean=quadratic / (linear + quadratic),
        attention_share_at_limit=flops.attention_share(arch, batch.longest_tokens),
        forward_equivalents=work / (linear + quadratic),
        flops_per_step=work * tokens,
        seconds=seconds,
        seconds_per_step=total,
        bottleneck=max(seconds, key=lambda name: seconds[name]),
        tokens_per_device_second=tokens / total / max(1, machine.devices),
        device_hours=total * recipe.trainer.max_steps * machine.devices / 3600,
        hours=total * recipe.trainer.max_steps / 3600,
    )


def _recomputed(recipe: Recipe, arch: Architecture) -> tuple[float, float]:
    """Shares of the linear and of the quadratic work that are done once more in the backward pass."""
    if recipe.trainer.recompute == "full":
        return 1.0, 1.0
    if recipe.trainer.recompute == "selective":
        return flops.expert_flops(arch) / flops.linear_flops(arch), 1.0
    return 0.0, 0.0


def _train_seconds(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    batch: BatchPlan,
    machine: Machine,
    amount: tuple[float, float],
    passes: float,
) -> float:
    """Seconds in which the trainer does (linear, quadratic) operations a token over a whole rollout batch."""
    device, tokens = machine.device, batch.expected_tokens_per_batch
    each = tokens / machine.ranks
    attention = each * amount[1] / (device.matmul * ATTENTION_SHARE)
    products = each * amount[0] / (device.matmul * LINEAR_SHARE)
    element = 4 if recipe.model.dtype == "float32" else 2
    # Every rank sees its own share of the tokens in its own stage's layers only.
    here = tokens * layout.pipeline / machine.ranks * arch.num_hidden_layers / layout.pipeline * passes
    exchange, ring = _exchange_seconds(arch, layout, machine, here, element)
    busy = products + max(attention, ring) + exchange
    return busy * IMBALANCE / (1 - batch.pipeline_bubble)


def _exchange_seconds(
    arch: Architecture, layout: Layout, machine: Machine, token_layers: float, element: int
) -> tuple[float, float]:
    """Seconds of (tensor- and expert-parallel exchanges, ring of keys and values), for so many tokens times layers."""
    speed = {
        span.name: (machine.device.node_link if span.inside_node else machine.device.network) * EXCHANGE_SHARE
        for span in spans(layout, machine.per_node)
    }
    state = arch.hidden_size * element
    # token_layers counts each token once, on the CP rank and TP group that hold it; TP ranks move it together.
    gathered = 2 * state * (layout.tensor - 1) * token_layers / speed["tensor"]
    sent = 2 * state * arch.num_experts_per_tok * (1 - 1 / layout.expert) * token_layers / speed["expert"]
    keys = 2 * arch.num_key_value_heads * arch.head_dim * element
    ring = keys * (layout.context - 1) * token_layers / speed["context"]
    return gathered + sent, ring


def _update_seconds(recipe: Recipe, rollout: RolloutPlan, stages: list[StageMemory], machine: Machine) -> float:
    """New weights to every server; with shared GPUs also the trainer's states to host memory and back."""
    if machine.is_cpu:
        return rollout.weight_bytes / (machine.device.node_link * UPDATE_SHARE)
    if not machine.colocated:
        return rollout.weight_bytes / (machine.device.network * UPDATE_SHARE)
    states = max(stage.static_bytes for stage in stages)
    return rollout.weight_bytes / (machine.device.node_link * UPDATE_SHARE) + 2 * states / HOST_LINK
