"""Static against dynamic context parallelism on one draw of lengths, for `bench_packing.py`.

Seconds are those of `gspo plan` for H100s: scoring and training once with full recomputation, TP1, CP8, a slot as long
as its slowest rank; their bound is `least_time`, which no packs beat, of whatever sizes they are. Bytes are keys and
values that ranks receive in one forward pass; `tests/parallel/test_context_bytes.py` counts them from collectives and
finds this formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.context_bound import least_time
from gspo_megatron.data.context_packing import SharedPack, pack_shared
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import Layout, round_up
from gspo_megatron.plan.estimate.flops import kv_bytes
from gspo_megatron.plan.estimate.sequence_time import SequenceTime

CONTEXT = 8
RECIPES = {"30B": "qwen3_30b_a3b_gspo_100k.yaml", "235B": "qwen3_235b_a22b_gspo_100k.yaml"}
PLAIN = ("tensor_parallel=1", "pipeline_parallel=1", "recompute=full", "dynamic_context_parallel=true")
NONE = ("virtual_pipeline", "first_stage_layers", "last_stage_layers")
Slots = Sequence[Sequence[Sequence[SharedPack]]]


@lru_cache(maxsize=8)
def recipe_of(model: str, max_tokens: int) -> Recipe:
    """The shipped recipe of long responses, on H100s, without tensor- and pipeline-parallel ranks."""
    changes = [f"trainer.{change}" for change in (*PLAIN, f"context_parallel={CONTEXT}")]
    changes += [f"trainer.{key}=null" for key in NONE]
    path = Path(__file__).resolve().parents[1] / "recipes" / RECIPES[model]
    return load_recipe(path, [*changes, f"trainer.micro_batch_tokens={max_tokens}", "placement.gpu=h100"])


def by_rank(slots: Slots, value: Callable[[SharedPack], float], group: int) -> np.ndarray:
    """[slot, group, rank of it] a value of the pack that each rank holds a part of."""
    rows = [[value(one) for row in slot for one in row for _ in range(one.ranks)] for slot in slots]
    return np.array(rows).reshape(len(slots), -1, group)


def slowest(values: np.ndarray) -> float:
    """The slowest group: the sum over its slots of the slowest rank."""
    return float(values.max(axis=2).sum(axis=0).max())


def compare(
    lengths: list[int], flops: list[float], model: str, rows: int, span: int, max_tokens: int, static: list[Any]
) -> dict[str, float]:
    """One draw.

    Args:
        lengths: tokens of each sequence.
        flops: of each.
        model: a key of `RECIPES`.
        rows: data-parallel ranks.
        span: of them share one set of experts.
        max_tokens: most tokens of a pack that all ranks share.
        static: [slot][row] -> sequences, as `pack` gives them.
    """
    ranks, group, recipe = rows * CONTEXT, span * CONTEXT, recipe_of(model, max_tokens)
    layout = Layout(ranks, context=CONTEXT, dynamic=True, expert=min(group, recipe.arch.num_experts))
    time = SequenceTime(recipe, layout)
    begin = process_time()
    slots = pack_shared(lengths, time, layout, max_tokens, time.slot, span)
    milliseconds = 1e3 * (process_time() - begin)
    whole = [[[SharedPack(CONTEXT, members)] for members in slot] for slot in static]

    def seconds(packs: Slots) -> float:
        spent = by_rank(packs, lambda one: time.seconds([lengths[i] for i in one.members], one.ranks), group)
        return slowest(spent) + time.slot * len(packs)

    def received(packs: Slots) -> float:
        tokens = by_rank(packs, lambda one: sum(lengths[i] for i in one.members) * (one.ranks - 1) / one.ranks, group)
        return float(tokens.sum()) * kv_bytes(recipe.arch)

    spent = by_rank(slots, lambda one: sum(flops[i] for i in one.members) / one.ranks, group)
    bound = least_time(lengths, time.floor, layout, max_tokens, time.slot, span)
    padded = [
        sum(round_up(lengths[i], layout.padding_of(one.ranks)) for i in one.members) / one.ranks
        for slot in slots
        for row in slot
        for one in row
    ]
    return {
        "W": slowest(spent) / (sum(flops) / ranks),
        "static_over_dynamic_seconds": seconds(whole) / seconds(slots),
        "seconds_over_bound": seconds(slots) / bound,
        "static_seconds_over_bound": seconds(whole) / bound,
        "bytes_over_static": received(slots) / received(whole),
        "ranks_of_a_sequence": float(np.mean([one.ranks for slot in slots for row in slot for one in row
                                              for _ in one.members])),
        "slots": len(slots),
        "milliseconds": milliseconds,
        "fullest": max(padded) * CONTEXT,
    }  # fmt: skip
