"""Estimates of what a training step keeps for its backward pass, and of what one layer needs while it works.

First order, from the shapes of the tensors that the layer's operations save; fragmentation is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.types import ITEM_BYTES

PEAK_IMBALANCE, MEAN_IMBALANCE = 1.5, 1.1
"""Rows of the fullest expert rank over the mean, in its fullest layer and over all layers; auxiliary loss 0."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One transformer layer on one rank, full micro-batch."""

    arch: Architecture
    """The model."""
    layout: Layout
    """Where the rank stands."""
    recompute: str
    """`none`, `selective`, `full`."""
    tokens: float
    """Tokens of the rank's share of a micro-batch: micro_batch_tokens / CP."""
    element: int
    """Bytes of an activation."""

    @classmethod
    def of(cls, recipe: Recipe, arch: Architecture, layout: Layout) -> Shape:
        """The layer that a recipe trains."""
        tokens = recipe.trainer.micro_batch_tokens / layout.context
        return cls(arch, layout, recipe.trainer.recompute, tokens, ITEM_BYTES[recipe.model.dtype])

    @property
    def input_bytes(self) -> int:
        """The input of a layer, cut over the tensor-parallel ranks by sequence parallelism."""
        return int(self.tokens / self.layout.tensor * self.arch.hidden_size * self.element)

    def rows(self, spread: float) -> float:
        """Token copies that reach this rank's experts in a layer, with so uneven a load."""
        layout = self.layout
        copies = self.tokens / layout.tensor * self.arch.num_experts_per_tok * layout.expert_tensor
        return copies * (spread if layout.expert > 1 else 1.0)

    @property
    def groups(self) -> float:
        """Key-value heads that the rank attends with: one at least, though several ranks then share it."""
        return max(self.arch.num_key_value_heads / self.layout.tensor, 1.0)

    @property
    def projection_bytes(self) -> int:
        """Queries, keys and values as they come from their projection.

        With more tensor-parallel ranks than key-value heads Megatron gathers the heads of all ranks, and what each
        picks are views: the whole product is kept.
        """
        arch = self.arch
        heads = arch.num_attention_heads + 2 * arch.num_key_value_heads
        ranks = 1 if self.layout.tensor > arch.num_key_value_heads else self.layout.tensor
        return int(self.tokens * heads * arch.head_dim / ranks * self.element)

    @property
    def attention_bytes(self) -> int:
        """Saved: norm and its input, queries, keys and values, the first two again after rotation, the output."""
        queries = self.arch.num_attention_heads / self.layout.tensor
        heads = (queries + self.groups) + queries
        normalisers = self.tokens * queries * 4
        rotated = int(self.tokens * heads * self.arch.head_dim * self.element + normalisers)
        return self.projection_bytes + rotated + 2 * self.input_bytes

    def mixer_bytes(self, spread: float) -> int:
        """Saved: norm and its input, the rows that came in, gate and up, their product; scores of the router.

        Rows on their way back are not: the weights of the experts are applied before the second product.
        """
        arch, layout, element = self.arch, self.layout, self.element
        if not arch.num_experts:
            return int(self.tokens * 3 * arch.intermediate_size / layout.tensor * element) + 2 * self.input_bytes
        width = arch.hidden_size + 3 * arch.moe_intermediate_size / layout.expert_tensor
        scores = self.tokens / layout.tensor * arch.num_experts * 4 * 2
        return int(self.rows(spread) * width * element + scores) + 2 * self.input_bytes

    @property
    def layer_bytes(self) -> int:
        """Everything that a layer of mean load saves."""
        return self.attention_bytes + self.mixer_bytes(MEAN_IMBALANCE)

    @property
    def work_bytes(self) -> int:
        """What comes and goes in the fullest layer: rows on their way, gradients of the widest tensors, the KV ring."""
        arch, layout = self.arch, self.layout
        if arch.num_experts:
            sent = 2 * self.tokens / layout.tensor * arch.num_experts_per_tok * arch.hidden_size
            width = 2 * arch.hidden_size + 2 * arch.moe_intermediate_size / layout.expert_tensor
            wide = self.rows(PEAK_IMBALANCE) * width + sent
        else:
            wide = self.tokens * 2 * arch.intermediate_size / layout.tensor
        ring = 0.0
        if layout.context > 1:
            ring = 4 * self.tokens * 2 * self.groups * arch.head_dim
        return int((wide + ring) * self.element)

    @property
    def peak_bytes(self) -> int:
        """One layer at work: what it saves under the fullest load, and what comes and goes."""
        return self.attention_bytes + self.mixer_bytes(PEAK_IMBALANCE) + self.work_bytes

    @property
    def kept_bytes(self) -> int:
        """What a layer keeps until its backward pass under the recipe's recomputation."""
        if self.recompute == "full":
            return self.input_bytes
        if self.recompute == "selective":
            return self.attention_bytes + 2 * self.input_bytes
        return self.layer_bytes


def layers_in_flight(layout: Layout, batch: BatchPlan, stage: int, layers: int) -> int:
    """Layer inputs that a stage holds at its fullest moment: 1F1B, or megatron's interleaved order."""
    waiting = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return min(batch.micro_batches_most, waiting + 1) * layers
    chunks = 2 * waiting + (layout.virtual - 1) * layout.pipeline + 1
    return min(batch.micro_batches_most * layout.virtual, chunks) * (layers // layout.virtual)


def offloaded_bytes(shape: Shape, batch: BatchPlan, stage: int, layers: int) -> int:
    """Layer inputs in pinned host memory, whose blocks torch rounds up to powers of two."""
    return layers_in_flight(shape.layout, batch, stage, layers) * 2 ** (shape.input_bytes - 1).bit_length()


def saved_bytes(shape: Shape, batch: BatchPlan, stage: int, layers: int) -> int:
    """Activations kept for backward passes to come."""
    held = layers_in_flight(shape.layout, batch, stage, layers)
    # Without recomputation the layer at work is one of those that are kept.
    return max(0, held - (0 if shape.recompute == "full" else 1)) * shape.kept_bytes


def head_bytes(shape: Shape, chunk: int) -> int:
    """The log-prob head: gathered states and their gradient, logits of one chunk, the head's gradient in both types."""
    arch = shape.arch
    rows = arch.vocab_size / shape.layout.tensor
    states = 2 * shape.tokens * arch.hidden_size * shape.element
    logits = 3 * min(chunk, shape.tokens) * rows * 4
    gradient = rows * arch.hidden_size * (4 + (shape.element if shape.element < 4 else 0))
    return int(states + logits + gradient)
