"""Seconds of one transformer layer, and of the head, for one micro-batch on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.models.registry import family_of
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.attention_time import CPU_SHARE, Slot, attention_seconds
from gspo_megatron.plan.estimate.practice import Practice, link_speed

FLOOR_POWER = 1.5
"""How an expert's least time and its arithmetic add up. Source: eight grouped products of the H100 slice, within 10 %
for 128 experts and 20 % for 16."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds by cause."""

    products: float = 0.0
    """Matrix products outside the experts."""
    experts: float = 0.0
    """Matrix products of the experts."""
    attention: float = 0.0
    """Attention scores, and the part of the ring of keys and values that they do not hide."""
    memory: float = 0.0
    """Operations that read and write memory: norms, activation functions, sorting tokens, logits."""
    exchange: float = 0.0
    """Tensor- and expert-parallel communication, sends between stages, layer inputs on their way to the host."""
    launches: float = 0.0
    """Time that depends on no size."""

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def times(self, factor: float) -> Seconds:
        """Return a multiple."""
        return Seconds(*(getattr(self, one.name) * factor for one in fields(self)))

    @property
    def total(self) -> float:
        """The sum."""
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer and one micro-batch."""

    attention: Seconds
    """Forward, with its norm."""
    mixer: Seconds
    """Forward: experts or feed-forward layer, with its norm."""
    attention_back: Seconds
    mixer_back: Seconds
    norms: Seconds
    """The two norms of a layer, forward."""
    activation: Seconds
    """Gate times up, forward."""

    @property
    def both(self) -> Seconds:
        """Forward and backward."""
        return self.attention + self.mixer + self.attention_back + self.mixer_back


def repeated(layer: LayerTime, modules: Sequence[str], recompute: str) -> Seconds:
    """Return the time of what the backward pass computes again.

    Args:
        layer: one layer.
        modules: of `recompute=selective`, in Megatron's words.
        recompute: `none`, `selective`, `full`.
    """
    if recompute == "full":
        return layer.attention + layer.mixer
    again = Seconds()
    for module in modules:
        again += {
            "moe": layer.mixer,
            "mlp": layer.mixer,
            "core_attn": Seconds(attention=layer.attention.attention),
            "layernorm": layer.norms,
            "moe_act": layer.activation,
        }[module]
    return again


def layer_time(arch: Architecture, layout: Layout, machine: Machine, slot: Slot, practice: Practice) -> LayerTime:
    """Estimate one layer of a micro-batch."""
    share = CPU_SHARE if machine.is_cpu else practice.rates.product_share
    products = family_of(arch).layer_products(arch)
    routed = arch.num_experts_per_tok * flops.expert_parameters(arch) if arch.num_experts else 0
    mlp = 0 if arch.num_experts else 3 * arch.hidden_size * arch.intermediate_size
    each = 2 * slot.tokens / layout.tensor / (machine.device.matmul * share)
    launches = 0.0 if machine.is_cpu else practice.rates.layer_seconds / 2
    scores, scores_back = attention_seconds(arch, layout, machine, [slot], practice)
    gather = _tensor_seconds(arch, layout, machine, slot, practice)
    spread = 1.0 if practice.balanced or layout.expert == 1 else practice.rates.expert_imbalance
    sent = _dispatch_seconds(arch, layout, machine, slot, practice, spread)
    experts = _expert_seconds(arch, layout, machine, slot, practice, spread)
    speed = machine.device.bandwidth * practice.rates.element_share * layout.tensor
    moved = [0.0 if machine.is_cpu else size * slot.tokens / speed for size in _element_bytes(arch, layout, practice)]
    width = arch.num_experts_per_tok * arch.moe_intermediate_size if arch.num_experts else arch.intermediate_size
    norm, product = (
        0.0 if machine.is_cpu else 2 * size * slot.tokens / speed for size in (4 * arch.hidden_size, 3 * width)
    )
    dense = (products - routed - mlp) * each
    return LayerTime(
        Seconds(dense, 0.0, scores, moved[0], gather, launches),
        Seconds(mlp * each, experts, 0.0, moved[1] * spread, sent, launches),
        Seconds(2 * dense, 0.0, scores_back, 2 * moved[0], 1.5 * gather, 2 * launches),
        Seconds(2 * mlp * each, 2 * experts, 0.0, 2 * moved[1] * spread, sent, 2 * launches),
        Seconds(memory=norm),
        Seconds(memory=product * spread),
    )


def head_time(
    arch: Architecture, layout: Layout, machine: Machine, slot: Slot, practice: Practice
) -> tuple[Seconds, Seconds]:
    """Estimate the head of a micro-batch: (forward, forward and backward). The backward pass computes logits again."""
    share = CPU_SHARE if machine.is_cpu else practice.rates.product_share
    rows = arch.vocab_size / layout.tensor
    product = 2 * slot.tokens * rows * arch.hidden_size / (machine.device.matmul * share)
    passes = 4 * slot.tokens * rows * practice.head_passes / (machine.device.bandwidth * practice.rates.copy_share)
    return Seconds(products=product, memory=passes), Seconds(products=4 * product, memory=2 * passes)


def _expert_seconds(
    arch: Architecture, layout: Layout, machine: Machine, slot: Slot, practice: Practice, spread: float
) -> float:
    """The two grouped products of a forward pass. A small expert takes as long as its launch."""
    if not arch.num_experts:
        return 0.0
    local = arch.num_experts / layout.expert
    rows = spread * slot.tokens / layout.tensor * arch.num_experts_per_tok * layout.expert / arch.num_experts
    work = 2 * rows * flops.expert_parameters(arch)
    if machine.is_cpu:
        return local * work / (machine.device.matmul * CPU_SHARE)
    rate, floor = machine.device.matmul * practice.rates.product_share, practice.rates.expert_floor
    parts = (work * 2 / 3 / rate, work / 3 / rate)
    return local * sum((floor**FLOOR_POWER + part**FLOOR_POWER) ** (1 / FLOOR_POWER) for part in parts)


def _element_bytes(arch: Architecture, layout: Layout, practice: Practice) -> tuple[float, float]:
    """Bytes of a token that (attention and norms, experts or feed-forward) read and write in a forward pass."""
    heads = (2 * arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
    # Norm and residual sum read two and write two; norm and rotation of queries and keys read and write each.
    attention = 2 * (5 * arch.hidden_size + 4 * heads)
    if not arch.num_experts:
        return attention, 2 * (5 * arch.hidden_size + 3 * arch.intermediate_size)
    chosen = arch.num_experts_per_tok
    # Copies are sorted by rank, and by expert on arrival; back the same way, to be summed. Fused dispatch sorts as it
    # sends.
    copies = 6 if practice.dispatch == "all_to_all" and layout.expert > 1 else 3
    rows = chosen * (copies * layout.expert_tensor * arch.hidden_size + 3 * arch.moe_intermediate_size)
    return attention, 2 * (5 * arch.hidden_size + rows + 4 * arch.num_experts)


def _tensor_seconds(arch: Architecture, layout: Layout, machine: Machine, slot: Slot, practice: Practice) -> float:
    """All-gather before and reduce-scatter after attention (and a dense feed-forward layer). Backward gathers again."""
    if layout.tensor == 1:
        return 0.0
    inside = machine.domain % layout.tensor == 0
    speed = link_speed(machine, practice, inside)
    states = slot.tokens * arch.hidden_size * 2 * (layout.tensor - 1) / layout.tensor
    found = (2 if arch.num_experts else 4) * states / speed
    if layout.tensor > arch.num_key_value_heads:  # every rank gathers the queries, keys and values of all heads
        heads = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
        found += slot.tokens * heads * 2 * (layout.tensor - 1) / layout.tensor / speed
    return found


def _dispatch_seconds(
    arch: Architecture, layout: Layout, machine: Machine, slot: Slot, practice: Practice, spread: float
) -> float:
    """Tokens to their experts and back. The backward pass sends the same bytes the other way."""
    if not arch.num_experts:
        return 0.0
    state, sent = arch.hidden_size * 2, slot.tokens / layout.tensor
    # Ranks that hold slices of the same experts gather the rows of all of them, and scatter the sums.
    shared = 2 * sent * state * arch.num_experts_per_tok * (layout.expert_tensor - 1)
    gathered = spread * shared / link_speed(machine, practice, machine.domain % layout.expert_tensor == 0)
    if layout.expert == 1:
        return gathered
    network, link = link_speed(machine, practice, False), link_speed(machine, practice, True)
    outside, inside = _copies(layout, machine, arch.num_experts_per_tok, practice, spread)
    if practice.dispatch == "all_to_all":
        copies = outside / network + inside / link
    else:
        # Links hand tokens on while the next ones are on the network. Source: DeepEP at 0297fc8, 90 and 61 GB/s with 2
        # and 4 nodes of H100s, of which 1/2 and 1/4 stay in the node: 45 GB/s of the network's 50 in both.
        copies = max(outside / network, inside / link)
    seconds = 2 * sent * state * copies
    return gathered + seconds * (1 - practice.rates.hidden_share if practice.dispatch == "overlapped" else 1)


def _copies(layout: Layout, machine: Machine, chosen: int, practice: Practice, spread: float) -> tuple[float, float]:
    """Copies of a token that (leave the node, go to another rank of a node), where the fullest rank is waited for."""
    ranks = layout.expert
    near = min(ranks, max(1, machine.domain // layout.expert_tensor))
    if practice.dispatch == "all_to_all":
        return spread * chosen * (1 - near / ranks), spread * chosen * (near - 1) / ranks
    # One copy to each node that has a chosen expert, and from there one to each rank that has. A full node or rank gets
    # no more than one of each token, however many of its experts are chosen.
    nodes = max(1, ranks // near)
    met, held = (min(1.0, spread * (1 - (1 - 1 / places) ** chosen)) for places in (nodes, ranks))
    return (nodes - 1) * met, (ranks - nodes) * held
