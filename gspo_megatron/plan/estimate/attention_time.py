"""Seconds of attention's scores, and of what context-parallel ranks exchange beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate.practice import Practice, link_speed

ATTENTION_FORWARD = ((2048, 0.401), (8192, 0.573), (32768, 0.588), (102400, 0.528))
"""(length, share of peak FLOP/s) of the attention kernel. Source: `tools/results/h100_slice.json`, 2026-11-26."""
ATTENTION_BACKWARD = ((2048, 0.304), (8192, 0.441), (32768, 0.539), (102400, 0.548))
"""The same backward, of 2.5 times the operations: the scores are computed again."""
CPU_SHARE = 0.4
"""Share of a core's rate in every product; within a factor of two."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch on one rank."""

    tokens: float
    """Tokens after the context-parallel cut."""
    length: float
    """Mean length that a token attends over, twice its mean position: E[l^2] / E[l]."""


def attention_seconds(
    arch: Architecture, layout: Layout, machine: Machine, slots: Sequence[Slot], practice: Practice
) -> tuple[float, float]:
    """Attention scores forward and backward, with what context-parallel ranks exchange and scores do not hide.

    A ring goes round while scores are computed. Heads are exchanged, and keys and values gathered, before or after.

    Args:
        arch: of the model.
        layout: its `context` ranks share all of `slots`.
        machine: that it runs on.
        slots: parts of one micro-batch, each of sequences of like length.
        practice: of the trainer.
    """
    scores = scores_seconds(arch, layout, machine, slots)
    return beside_scores(
        layout, scores, sum(slot.tokens for slot in slots), token_seconds(arch, layout, machine, practice)
    )


def token_seconds(arch: Architecture, layout: Layout, machine: Machine, practice: Practice) -> tuple[float, float]:
    """Seconds of each token of a rank in a forward pass: (exchanging heads, getting keys and values)."""
    ranks = layout.context
    reaches = (layout.tensor * layout.head_ranks(ranks), layout.tensor * ranks)
    heads, keys = (
        size / link_speed(machine, practice, machine.domain % reach == 0)
        for size, reach in zip(exchanged_bytes(arch, layout, 2), reaches, strict=True)
    )
    return heads, keys


def beside_scores(
    layout: Layout, scores: tuple[float, float], tokens: float, each: tuple[float, float]
) -> tuple[float, float]:
    """Add to scores forward and backward what they do not hide of the exchange of so many tokens a rank."""
    (forward, backward), heads, keys = scores, tokens * each[0], tokens * each[1]
    if layout.context_exchange == "all_gather":
        return forward + keys, backward + 2 * keys
    # Backward the gradients of keys and values go round with them, and those of heads go back as they came.
    return max(keys, forward) + heads, max(2 * keys, backward) + heads


def scores_seconds(arch: Architecture, layout: Layout, machine: Machine, slots: Sequence[Slot]) -> tuple[float, float]:
    """Scores alone, forward and backward; the arguments of `attention_seconds`."""
    cut = layout.context // layout.head_ranks(layout.context)
    forward, backward = (
        sum(_score_seconds(arch, layout, machine, slot, slot.length / cut, back) for slot in slots)
        for back in (False, True)
    )
    return forward, backward


def exchanged_bytes(arch: Architecture, layout: Layout, element: int) -> tuple[float, float]:
    """Bytes that a rank receives in the forward pass of a layer for each of its tokens: (heads, keys and values).

    Where heads are exchanged, queries, keys and values come before the kernel and its output goes after it. Ranks that
    hold other tokens of the same heads then get keys and values of each other.

    Args:
        arch: of the model.
        layout: its `context` ranks share the pack.
        element: bytes of a value.
    """
    ranks = layout.context
    heads = layout.head_ranks(ranks)
    every = 2 * (arch.num_attention_heads + arch.num_key_value_heads) / layout.tensor
    groups = max(1.0, arch.num_key_value_heads / layout.tensor)
    value = arch.head_dim * element
    return every * value * (heads - 1) / heads, 2 * groups * value * (ranks // heads - 1)


def _score_seconds(
    arch: Architecture, layout: Layout, machine: Machine, slot: Slot, length: float, backward: bool
) -> float:
    """Scores of one direction; `length` is that of the kernel's own sequences, by which its rate goes."""
    work = 2 * arch.num_attention_heads * arch.head_dim * slot.length * slot.tokens / layout.tensor
    if machine.is_cpu:
        return (2 if backward else 1) * work / (machine.device.matmul * CPU_SHARE)
    points = ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
    return (2.5 if backward else 1) * work / (machine.device.matmul * _at(points, length))


def _at(points: tuple[tuple[int, float], ...], length: float) -> float:
    """Interpolate over the logarithm of the length; constant outside, but falling with the length below."""
    if length <= points[0][0]:
        return points[0][1] * max(0.25, (length / points[0][0]) ** 0.5)
    for low, high, before, slope in _segments(points):
        if length <= high:
            return before + slope * math.log(length / low)
    return points[-1][1]


@lru_cache
def _segments(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, int, float, float], ...]:
    """(low, high, value at low, slope over the logarithm) between the points."""
    return tuple(
        (low, high, before, (after - before) / math.log(high / low))
        for (low, before), (high, after) in pairwise(points)
    )
