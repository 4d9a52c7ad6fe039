"""Seconds of the trainer's two passes over a rollout batch: old log-probs, and training."""

from __future__ import annotations

import math
from dataclasses import replace

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.megatron_engine import recomputed_modules
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate.attention_time import Slot
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.layer_time import Seconds, head_time, layer_time, repeated
from gspo_megatron.plan.estimate.memory import held_by
from gspo_megatron.plan.estimate.practice import Practice, link_speed, practice_of
from gspo_megatron.plan.rules.layout import spans
from gspo_megatron.types import ITEM_BYTES

USUAL_BUCKET, USUAL_BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Parameters of a bucket, and of it for each replica. Source: megatron-core 0.19.2, `distributed_data_parallel.py`."""
OPTIMIZER_BYTES = 30
"""Bytes that Adam reads and writes for a parameter of its shard: gradient, main copy, two moments, weight."""


class TrainerTime:
    """Seconds of one pass of the trainer over a rollout batch."""

    __slots__ = ("busy", "updating", "waiting")

    def __init__(self, busy: Seconds, waiting: float, updating: float) -> None:
        self.busy, self.waiting, self.updating = busy, waiting, updating

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.busy.total + self.waiting + self.updating

    def __add__(self, other: TrainerTime) -> TrainerTime:
        return TrainerTime(self.busy + other.busy, self.waiting + other.waiting, self.updating + other.updating)

    def words(self) -> str:
        """Format the parts in percent."""
        busy = self.busy
        parts = {
            "products": busy.products + busy.experts,
            "attention": busy.attention,
            "memory": busy.memory,
            "exchanges": busy.exchange,
            "launches": busy.launches,
            "updates": self.updating,
            "waiting": self.waiting,
        }
        return ", ".join(f"{name} {part / self.seconds:.0%}" for name, part in parts.items() if part)


def trainer_times(
    recipe: Recipe, layout: Layout, batch: BatchPlan, machine: Machine, practice: Practice | None = None
) -> dict[str, TrainerTime]:
    """Estimate the trainer's two passes over a rollout batch: "old log-probs" and "training"."""
    arch, practice = recipe.arch, practice or practice_of(recipe)
    slots = batch.micro_batches_expected
    tokens = batch.expected_tokens_per_batch / batch.updates / layout.data / slots
    spread = min(practice.rates.length_spread, batch.longest_tokens / batch.expected_tokens)
    slot = Slot(tokens / layout.context, batch.expected_tokens * spread)
    shared = replace(layout, context=fewest_ranks(layout, slot.length, recipe.trainer.micro_batch_tokens))
    layer = layer_time(arch, shared, machine, slot, practice)
    again = repeated(layer, recomputed_modules(arch, recipe.trainer), recipe.trainer.recompute)
    score_head, train_head = head_time(arch, layout, machine, slot, practice)
    sizes = layout.stage_sizes(arch.num_hidden_layers)
    score = _slowest(sizes, layer.attention + layer.mixer, score_head)
    train = _slowest(sizes, layer.both + again, train_head)
    if recipe.trainer.offload_activations:
        inputs = slot.tokens / layout.tensor * arch.hidden_size * ITEM_BYTES[recipe.model.dtype] * max(sizes)
        train += Seconds(exchange=2 * inputs / practice.rates.host_link)
    sent = _send_seconds(recipe, layout, machine, slot, practice)
    passes = 2 if recipe.objective.kl != "none" else 1
    found = {}
    for part, busy in (("old log-probs", (score + Seconds(exchange=sent)).times(passes)),
                       ("training", train + Seconds(exchange=2 * sent))):  # fmt: skip
        # Scoring has no backward pass to wait for: its stages fill once for all updates of a batch.
        rounds = slots * batch.updates
        whole = busy.times(rounds)
        waiting = whole.total * (_imbalance(recipe, layout, batch, practice) - 1)
        virtual = practice.virtual or layout.virtual
        fills = batch.updates if part == "training" else passes
        waiting += (layout.pipeline - 1) * busy.total / virtual * fills / (1 if part == "training" else passes)
        updating = 0.0
        if part == "training":
            updating = batch.updates * update_seconds(recipe, layout, machine, practice, busy.total)
        found[part] = TrainerTime(whole, waiting, updating)
    return found


def fewest_ranks(layout: Layout, length: float, micro_batch_tokens: int) -> int:
    """Return the context-parallel ranks that share a sequence of this length: the fewest that hold it."""
    each = micro_batch_tokens / layout.context
    return next((size for size in layout.context_sizes if length <= each * size), layout.context)


def _imbalance(recipe: Recipe, layout: Layout, batch: BatchPlan, practice: Practice) -> float:
    """Return the work of the fullest rank in a micro-batch, over that of the mean."""
    if layout.data == 1:
        return 1.0
    if practice.packing == "first_fit":
        room = recipe.trainer.micro_batch_tokens
        return room / (max(1, room // batch.expected_tokens) * batch.expected_tokens)
    return practice.rates.slot_imbalance


def _slowest(sizes: list[int], layer: Seconds, head: Seconds) -> Seconds:
    """Return the time of the slowest stage; the last one has the head."""
    first, last = layer.times(max(sizes)), layer.times(sizes[-1]) + head
    return max(first, last, key=lambda stage: stage.total)


def _send_seconds(recipe: Recipe, layout: Layout, machine: Machine, slot: Slot, practice: Practice) -> float:
    """Send the states of a micro-batch to the next stage."""
    if layout.pipeline == 1:
        return 0.0
    states = slot.tokens / layout.tensor * recipe.arch.hidden_size * ITEM_BYTES[recipe.model.dtype]
    return (practice.virtual or layout.virtual) * states / link_speed(machine, practice, layout.world <= machine.domain)


def update_seconds(
    recipe: Recipe, layout: Layout, machine: Machine, practice: Practice | None = None, backward: float = 0.0
) -> float:
    """Estimate reducing the gradients, the optimizer's step and gathering the parameters, once an update.

    Args:
        backward: seconds of a micro-batch, behind which an overlapped reduction hides.
    """
    practice = practice or practice_of(recipe)
    held = held_by(recipe.arch, layout, 0, recipe.objective.has_critic)
    inside = {span.name: span.inside_node for span in spans(layout, machine.domain)}
    kinds = (
        (sum(sum(chunk.dense) for chunk in held), layout.data * layout.context, inside["data"] and inside["context"]),
        (sum(sum(chunk.expert) for chunk in held), layout.expert_data, inside["expert_data"]),
    )
    weight = ITEM_BYTES[recipe.model.dtype]
    reduced = gathered = step = 0.0
    if not practice.fuses_accumulation and not machine.is_cpu:
        step += practice.rates.tensor_seconds * sum(len(chunk.dense) + len(chunk.expert) for chunk in held)
    hidden = 0.0
    for parameters, copies, near in kinds:
        sent = parameters * (copies - 1) / copies / link_speed(machine, practice, near)
        reduced, gathered = reduced + sent * practice.gradient_bytes, gathered + sent * weight
        if practice.overlaps_reduction and parameters and copies > 1:
            # Each bucket is a collective of its own, and the last one has no backward pass left to hide behind.
            bucket = min(parameters, practice.bucket or max(USUAL_BUCKET, USUAL_BUCKET_PER_RANK * copies))
            least = practice.rates.sum_seconds if near else practice.rates.far_sum_seconds
            reduced += least * math.ceil(parameters / bucket)
            hidden += sent * practice.gradient_bytes * (1 - bucket / parameters)
        shard = parameters / (copies if recipe.trainer.distributed_optimizer else 1)
        step += shard * OPTIMIZER_BYTES / (machine.device.bandwidth * practice.rates.copy_share)
        # Zeroing the buffer, and the norm of the gradients.
        step += parameters * practice.gradient_bytes * 2 / (machine.device.bandwidth * practice.rates.copy_share)
    hidden += gathered * practice.overlaps_gather
    return step + reduced + gathered - min(hidden, backward)
