"""What parts of a layer cost: matrix products, and bytes that they save for the backward pass, each counted once.

A family's `costs.py` puts its layer together from these. First order, from the shapes of the tensors that the
operations save; fragmentation is not in here. Biases are left out of both: their share is 1 / hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Layout


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One transformer layer on one rank, full micro-batch."""

    arch: Architecture
    """The model."""
    layout: Layout
    """Where the rank stands."""
    tokens: float
    """Tokens of the rank's share of a micro-batch: micro_batch_tokens / CP."""
    element: int
    """Bytes of an activation."""

    @property
    def input_bytes(self) -> int:
        """The input of a layer, cut over the tensor-parallel ranks by sequence parallelism."""
        return int(self.tokens / self.layout.tensor * self.arch.hidden_size * self.element)

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

    def rows(self, spread: float) -> float:
        """Token copies that reach this rank's experts in a layer whose fullest rank holds `spread` times the mean."""
        layout = self.layout
        copies = self.tokens / layout.tensor * self.arch.num_experts_per_tok * layout.expert_tensor
        return copies * (spread if layout.expert > 1 else 1.0)


def attention_products(arch: Architecture) -> int:
    """Multiply-adds of one token in the projections around attention; its scores are not in here."""
    return arch.hidden_size * arch.head_dim * 2 * (arch.num_attention_heads + arch.num_key_value_heads)


def gated_mlp_products(arch: Architecture) -> int:
    """Multiply-adds of one token in a dense feed-forward layer."""
    return 3 * arch.hidden_size * arch.intermediate_size


def expert_products(arch: Architecture) -> int:
    """Multiply-adds of one token in one expert, which are the parameters of that expert."""
    return 3 * arch.hidden_size * arch.moe_intermediate_size


def attention_bytes(shape: LayerShape) -> int:
    """Saved: norm and its input, queries, keys and values, the first two again after rotation, the output.

    The product of the projection is kept with or without a norm behind it: the values are a view of it.
    """
    queries = shape.arch.num_attention_heads / shape.layout.tensor
    heads = (queries + shape.groups) + queries
    normalisers = shape.tokens * queries * 4
    rotated = int(shape.tokens * heads * shape.arch.head_dim * shape.element + normalisers)
    return shape.projection_bytes + rotated + 2 * shape.input_bytes


def gated_mlp_bytes(shape: LayerShape) -> int:
    """Saved: norm and its input, gate and up, their product."""
    width = 3 * shape.arch.intermediate_size / shape.layout.tensor
    return int(shape.tokens * width * shape.element) + 2 * shape.input_bytes


def experts_bytes(shape: LayerShape, spread: float) -> int:
    """Saved: norm and its input, the rows that came in, gate and up, their product; scores of the router.

    Rows on their way back are not: the weights of the experts are applied before the second product.
    """
    arch, layout = shape.arch, shape.layout
    width = arch.hidden_size + 3 * arch.moe_intermediate_size / layout.expert_tensor
    scores = shape.tokens / layout.tensor * arch.num_experts * 4 * 2
    return int(shape.rows(spread) * width * shape.element + scores) + 2 * shape.input_bytes


def gated_mlp_work(shape: LayerShape) -> float:
    """Values that come and go in a dense layer: the gradient of its widest tensor."""
    return shape.tokens * 2 * shape.arch.intermediate_size / shape.layout.tensor


def experts_work(shape: LayerShape, spread: float) -> float:
    """Values that come and go in a layer of experts: rows on their way, gradients of the widest tensors."""
    arch, layout = shape.arch, shape.layout
    sent = 2 * shape.tokens / layout.tensor * arch.num_experts_per_tok * arch.hidden_size
    width = 2 * arch.hidden_size + 2 * arch.moe_intermediate_size / layout.expert_tensor
    return shape.rows(spread) * width + sent
