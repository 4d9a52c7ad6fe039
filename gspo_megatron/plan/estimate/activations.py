"""Estimates of what a training step keeps for its backward pass, and of what one layer needs while it works.

The model's family (`models/`) gives the bytes of each part of a layer; this file adds recomputation and pipelining.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.layer_costs import LayerShape
from gspo_megatron.models.megatron_engine import recomputed_modules
from gspo_megatron.models.registry import family_of
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.types import ITEM_BYTES

PEAK_IMBALANCE, MEAN_IMBALANCE = 1.5, 1.1
"""Rows of the fullest expert rank over the mean, in its fullest layer and over all layers; auxiliary loss 0."""


@dataclass(frozen=True, slots=True)
class Shape(LayerShape):
    """One transformer layer on one rank under the recipe's recomputation."""

    recompute: str
    """`none`, `selective`, `full`."""
    modules: tuple[str, ...] = ()
    """Parts that `selective` repeats, in Megatron's words."""

    @classmethod
    def of(cls, recipe: Recipe, arch: Architecture, layout: Layout) -> Shape:
        """The layer that a recipe trains."""
        tokens = recipe.trainer.micro_batch_tokens / layout.context
        element, trainer = ITEM_BYTES[recipe.model.dtype], recipe.trainer
        return cls(arch, layout, tokens, element, trainer.recompute, recomputed_modules(arch, trainer))

    @property
    def attention_bytes(self) -> int:
        """What attention saves."""
        return family_of(self.arch).attention_bytes(self)

    def mixer_bytes(self, spread: float) -> int:
        """What the feed-forward layer or the experts save; the fullest expert rank holds `spread` times the mean."""
        return family_of(self.arch).mixer_bytes(self, spread)

    @property
    def product_bytes(self) -> int:
        """Gate times up of the experts."""
        width = self.arch.moe_intermediate_size / self.layout.expert_tensor
        return int(self.rows(MEAN_IMBALANCE) * width * self.element)

    @property
    def layer_bytes(self) -> int:
        """Everything that a layer of mean load saves."""
        return self.attention_bytes + self.mixer_bytes(MEAN_IMBALANCE)

    @property
    def work_bytes(self) -> int:
        """What comes and goes in the fullest layer, and what is on its way between the context ranks."""
        wide, heads = family_of(self.arch).mixer_work(self, PEAK_IMBALANCE), 0.0
        ranks = self.layout.context
        exchanging = self.layout.head_ranks(ranks)
        if exchanging > 1:
            # Queries, keys, values and output, as they are sent and as they arrive.
            heads += 2 * 2 * (self.arch.num_attention_heads / self.layout.tensor + self.groups)
        if exchanging < ranks:
            # Keys, values and their gradients: twice on a ring. Gathered they are those of the whole pack, with the
            # gradients of two halves of the queries, and one that is put in another order.
            heads += (9 * ranks if self.layout.context_exchange == "all_gather" else 8) * self.groups
        return int((wide + heads * self.tokens * self.arch.head_dim) * self.element)

    @property
    def peak_bytes(self) -> int:
        """One layer at work: what it saves under the fullest load, and what comes and goes."""
        return self.attention_bytes + self.mixer_bytes(PEAK_IMBALANCE) + self.work_bytes

    @property
    def kept_bytes(self) -> int:
        """What a layer keeps until its backward pass under the recipe's recomputation."""
        if self.recompute == "full":
            return self.input_bytes
        # A repeated part keeps its input; a repeated norm gives its output up, a repeated activation the product.
        norm = self.input_bytes if "layernorm" in self.modules else 0
        if "moe" in self.modules or "mlp" in self.modules:
            return self.attention_bytes - norm + 2 * self.input_bytes
        return self.layer_bytes - 2 * norm - (self.product_bytes if "moe_act" in self.modules else 0)


def layers_in_flight(layout: Layout, batch: BatchPlan, stage: int, layers: int) -> int:
    """Layer inputs that a stage holds at its fullest moment: 1F1B, or megatron's interleaved order."""
    waiting = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return min(batch.micro_batches_most, waiting + 1) * layers
    chunks = 2 * waiting + (layout.virtual - 1) * layout.pipeline + 1
    return -(-min(batch.micro_batches_most * layout.virtual, chunks) * layers // layout.virtual)


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


def value_bytes(shape: Shape) -> int:
    """The value head: the states that it keeps apart from the log-prob head's and their gradient, and its values."""
    states = 2 * shape.tokens / shape.layout.tensor * shape.arch.hidden_size * shape.element
    return int(states + 2 * 4 * shape.tokens)
