"""FLOPs and seconds of a training step, from assumed rates. Good for comparisons and orders of magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.rules.layout import spans
from gspo_megatron.types import ITEM_BYTES

LINEAR_SHARE = 0.40
"""Share of peak FLOP/s in matrix products of attention, experts and head. NVIDIA's trainer reaches 0.30 with
communication included (30B-A3B, bfloat16, 16 H100, 4K tokens)."""
ATTENTION_SHARE = 0.55
"""Share of peak FLOP/s in attention kernels on long sequences, forward and backward together."""
IMBALANCE = 1.15
"""Time of the slowest rank over the mean: micro-batches of unequal length, experts of unequal load."""
LENGTH_SPREAD = 1.5
"""Mean of the squared sequence length over the square of the mean, within a batch, unless the limit bounds it lower."""
EXCHANGE_SHARE = 0.7
"""Share of a link's bandwidth in collectives."""
HOST_LINK = 55e9
"""Bytes/s between a GPU and pinned host memory."""
UPDATE_SHARE = 0.3
"""Share of the network's bandwidth in a weight update. Published updates take 2 to 6 times the ideal."""


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """FLOPs and time of one rollout batch."""

    linear_flops_per_token: int
    """Forward FLOPs per token without attention scores."""
    quadratic_flops_per_token: float
    """Forward FLOPs per token of attention scores at the mean length."""
    attention_share_at_mean: float
    """Share of the attention scores in the forward FLOPs at the mean length."""
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
    bottleneck: str
    """Name of the longest part."""
    tokens_per_device_second: float
    """Trained tokens per second and GPU of the whole job."""
    device_hours: float
    """GPU-hours of `trainer.max_steps` steps."""
    hours: float
    """Hours of `trainer.max_steps` steps."""


@dataclass(frozen=True, slots=True)
class TrainerTime:
    """Seconds of one pass of the trainer over a rollout batch, by cause."""

    products: float
    """Matrix products of attention, experts and head."""
    attention: float
    """Attention scores."""
    exchange: float
    """Tensor- and expert-parallel communication, and the part of the CP ring that attention does not hide."""
    waiting: float
    """Imbalance of the ranks and idle pipeline stages."""

    @property
    def seconds(self) -> float:
        """The sum of the parts."""
        return self.products + self.attention + self.exchange + self.waiting

    def __add__(self, other: TrainerTime) -> TrainerTime:
        return TrainerTime(
            self.products + other.products,
            self.attention + other.attention,
            self.exchange + other.exchange,
            self.waiting + other.waiting,
        )

    def words(self) -> str:
        """Format the parts in percent."""
        parts = {"products": self.products, "attention": self.attention, "exchanges": self.exchange}
        return ", ".join(
            f"{name} {part / self.seconds:.0%}" for name, part in {**parts, "waiting": self.waiting}.items()
        )


def plan_compute(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    batch: BatchPlan,
    rollout: RolloutPlan,
    stages: list[StageMemory],
    machine: Machine,
) -> ComputePlan:
    """Estimate the FLOPs of a step and the seconds of its parts."""
    tokens = batch.expected_tokens_per_batch
    linear, quadratic = _flops_per_token(arch, batch)
    passes = [_passes(recipe, arch, part) for part in ("old log-probs", "training")]
    work = sum(linear * products + quadratic * scores for products, scores in passes)
    times = trainer_times(recipe, arch, layout, batch, machine)
    seconds = {"rollout": rollout.seconds, **{part: time.seconds for part, time in times.items()}}
    seconds["weight update"] = _update_seconds(rollout, stages, machine)
    if recipe.evaluation.every:
        size = recipe.evaluation.problems * recipe.evaluation.answers / batch.sequences
        seconds["evaluation"] = rollout.seconds * size / recipe.evaluation.every
    total = sum(seconds.values())
    if recipe.rollout.max_staleness and not machine.colocated:
        total -= min(sum(time.seconds for time in times.values()), seconds["rollout"])
    steps = recipe.trainer.max_steps
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
        device_hours=total * steps * machine.devices / 3600,
        hours=total * steps / 3600,
    )


def _flops_per_token(arch: Architecture, batch: BatchPlan) -> tuple[int, float]:
    """Return the forward FLOPs of a mean token: (linear, quadratic)."""
    # No length exceeds the limit, so the mean of the squares is at most limit * mean.
    spread = min(LENGTH_SPREAD, batch.longest_tokens / batch.expected_tokens)
    return flops.linear_flops(arch), flops.quadratic_flops(arch) * batch.expected_tokens * spread


def _passes(recipe: Recipe, arch: Architecture, part: str) -> tuple[float, float]:
    """Return how often the (linear, quadratic) work of a forward pass is done. A backward pass counts two."""
    if part == "old log-probs":
        times = 2.0 if recipe.objective.kl != "none" else 1.0
        return times, times
    if recipe.trainer.recompute == "full":
        return 4.0, 4.0
    if recipe.trainer.recompute == "selective":
        return 3.0 + flops.expert_flops(arch) / flops.linear_flops(arch), 4.0
    return 3.0, 3.0


def trainer_times(
    recipe: Recipe, arch: Architecture, layout: Layout, batch: BatchPlan, machine: Machine
) -> dict[str, TrainerTime]:
    """Estimate the trainer's two passes over a rollout batch: "old log-probs" and "training"."""
    linear, quadratic = _flops_per_token(arch, batch)
    each, device = batch.expected_tokens_per_batch / machine.ranks, machine.device
    found = {}
    for part in ("old log-probs", "training"):
        passes = _passes(recipe, arch, part)
        products = each * linear * passes[0] / (device.matmul * LINEAR_SHARE)
        attention = each * quadratic * passes[1] / (device.matmul * ATTENTION_SHARE)
        exchange, ring = _exchange_seconds(recipe, arch, layout, machine, each * arch.num_hidden_layers * passes[0])
        exchange += max(0.0, ring - attention)
        if part == "training" and recipe.trainer.offload_activations:
            inputs = each * arch.num_hidden_layers * arch.hidden_size * ITEM_BYTES[recipe.model.dtype]
            exchange += 2 * inputs / HOST_LINK
        busy = products + attention + exchange
        waiting = busy * (IMBALANCE / (1 - batch.pipeline_bubble) - 1)
        found[part] = TrainerTime(products, attention, exchange, waiting)
    return found


def _exchange_seconds(
    recipe: Recipe, arch: Architecture, layout: Layout, machine: Machine, token_layers: float
) -> tuple[float, float]:
    """Return the seconds of (tensor- and expert-parallel communication, CP ring of keys and values).

    Args:
        token_layers: tokens of the batch * layers * passes / ranks. A rank works on TP * PP times as many tokens in
            1/PP of the layers, and communicates 1/TP of each.
    """
    speed = {
        span.name: (machine.device.node_link if span.inside_node else machine.device.network) * EXCHANGE_SHARE
        for span in spans(layout, machine.per_node)
    }
    element = ITEM_BYTES[recipe.model.dtype]
    state = arch.hidden_size * element
    gathered = 2 * state * (layout.tensor - 1) * token_layers / speed["tensor"]
    if layout.tensor > arch.num_key_value_heads:  # every rank gathers the queries, keys and values of all heads
        heads = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
        gathered += heads * element * (layout.tensor - 1) * token_layers / speed["tensor"]
    sent = 2 * state * arch.num_experts_per_tok * (1 - 1 / layout.expert) * token_layers / speed["expert"]
    keys = 2 * max(arch.num_key_value_heads, layout.tensor) * arch.head_dim * element
    ring = keys * (layout.context - 1) * token_layers / speed["context"]
    return gathered + sent, ring


def _update_seconds(rollout: RolloutPlan, stages: list[StageMemory], machine: Machine) -> float:
    """Return the seconds of a weight update. On shared GPUs the trainer's states also move to the host and back."""
    if machine.is_cpu:
        return rollout.weight_bytes / (machine.device.node_link * UPDATE_SHARE)
    if not machine.colocated:
        return rollout.weight_bytes / (machine.device.network * UPDATE_SHARE)
    states = max(stage.static_bytes for stage in stages)
    return rollout.weight_bytes / (machine.device.node_link * UPDATE_SHARE) + 2 * states / HOST_LINK
