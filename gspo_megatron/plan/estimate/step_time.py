"""FLOPs and seconds of a training step, from assumed rates. Good for comparisons and orders of magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.megatron_engine import recomputed_modules
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.calibration import TIME_RANGE
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.practice import Practice, practice_of
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.trainer_time import trainer_times


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """FLOPs and time of one rollout batch."""

    linear_flops_per_token: int
    """Forward FLOPs per token without attention scores."""
    quadratic_flops_per_token: float
    """Forward FLOPs per token of attention scores, for responses of mixed lengths (`length_spread`)."""
    attention_share_at_mean: float
    """Share of the attention scores in the forward FLOPs of such responses."""
    attention_share_at_limit: float
    """The same share for a sequence of the longest length."""
    forward_equivalents: float
    """Trainer FLOPs per token in forward passes: old log-probs, forward, backward (two), recomputation."""
    flops_per_step: float
    """FLOPs of the trainer per step, all ranks."""
    seconds: dict[str, float]
    """Time of one step by part, seconds."""
    seconds_per_step: float
    """Sum of the parts, less the overlap of rollout and training."""
    exchange_seconds: float
    """Part of the trainer's seconds in which ranks exchange tokens, states and the layers' inputs."""
    bottleneck: str
    """Name of the longest part."""
    tokens_per_device_second: float
    """Trained tokens per second and GPU of the whole job."""
    device_hours: float
    """GPU-hours of `trainer.max_steps` steps."""
    hours: float
    """Hours of `trainer.max_steps` steps."""
    price: float | None
    """Of the GPU-hours, at `placement.price`."""
    kilowatt_hours: float | None
    """Energy of the GPU-hours, at `placement.power`."""
    range: tuple[float, float]
    """Least and most of any of these times over the planned one."""


def plan_compute(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    batch: BatchPlan,
    rollout: RolloutPlan,
    stages: list[StageMemory],
    machine: Machine,
    practice: Practice | None = None,
) -> ComputePlan:
    """Estimate the FLOPs of a step and the seconds of its parts."""
    practice = practice or practice_of(recipe)
    tokens = batch.expected_tokens_per_batch
    spread = min(practice.rates.length_spread, batch.longest_tokens / batch.expected_tokens)
    linear, quadratic = flops.linear_flops(arch), flops.quadratic_flops(arch) * batch.expected_tokens * spread
    passes = [_passes(recipe, arch, part) for part in ("old log-probs", "training")]
    work = sum(linear * products + quadratic * scores for products, scores in passes)
    times = trainer_times(recipe, layout, batch, machine, practice)
    trainer = {part: time.seconds for part, time in times.items()}
    seconds = {"rollout": rollout.seconds, **trainer}
    seconds["weight update"] = _update_seconds(rollout, stages, machine, practice)
    if not machine.is_cpu:
        seconds["rewards and turns"] = practice.rates.batch_seconds
        seconds["rewards and turns"] += practice.rates.turn_seconds if machine.colocated else 0.0
    if recipe.evaluation.every:
        seconds["evaluation"] = rollout.evaluation_seconds / recipe.evaluation.every
    total = sum(seconds.values())
    if recipe.rollout.max_staleness and not machine.colocated:
        total -= min(sum(trainer.values()), seconds["rollout"])
    steps, placement = recipe.trainer.max_steps, recipe.placement
    device_hours = total * steps * machine.devices / 3600
    return ComputePlan(
        linear_flops_per_token=linear,
        quadratic_flops_per_token=quadratic,
        attention_share_at_mean=quadratic / (linear + quadratic),
        attention_share_at_limit=flops.attention_share(arch, batch.longest_tokens),
        forward_equivalents=work / (linear + quadratic),
        flops_per_step=work * tokens,
        seconds=seconds,
        seconds_per_step=total,
        exchange_seconds=sum(time.busy.exchange for time in times.values()),
        bottleneck=max(seconds, key=lambda name: seconds[name]),
        tokens_per_device_second=tokens / total / max(1, machine.devices),
        device_hours=device_hours,
        hours=total * steps / 3600,
        price=placement.price and device_hours * placement.price,
        kilowatt_hours=placement.power and device_hours * placement.power / 1e3,
        range=TIME_RANGE,
    )


def _passes(recipe: Recipe, arch: Architecture, part: str) -> tuple[float, float]:
    """Return how often the (linear, quadratic) work of a forward pass is done. A backward pass counts two."""
    if part == "old log-probs":
        times = 2.0 if recipe.objective.kl != "none" else 1.0
        return times, times
    if recipe.trainer.recompute == "full":
        return 4.0, 4.0
    again = recomputed_modules(arch, recipe.trainer)
    mixer = flops.mixer_flops(arch) / flops.linear_flops(arch) if {"moe", "mlp"} & set(again) else 0.0
    return 3.0 + mixer, 4.0 if "core_attn" in again else 3.0


def _update_seconds(rollout: RolloutPlan, stages: list[StageMemory], machine: Machine, practice: Practice) -> float:
    """Return the seconds of a weight update. On shared GPUs the trainer also moves to the host and back."""
    share = practice.rates.update_share
    if machine.is_cpu:
        return rollout.weight_bytes / (machine.device.node_link * share)
    if not machine.colocated:
        return rollout.weight_bytes / (machine.device.network * share)
    moved = max(stage.moved_bytes for stage in stages)
    return rollout.weight_bytes / (machine.device.node_link * share) + 2 * moved / practice.rates.host_link
