"""How evenly `pack` spreads long-tailed lengths, beside a proved bound and other frameworks' packing.

    python tools/bench_packing.py [--json] [--seeds N]

8 data-parallel ranks of 8 context-parallel GPUs each, at most 131,072 tokens a bin, forward FLOPs of Qwen3-30B-A3B and
Qwen3-235B-A22B. Lengths are lognormal, cut at 100,000 tokens: `math` has median 9K and sigma 1.0, `agent` median 24K
and sigma 0.75, `wide` median 24K and sigma 1.25. W is the time of the slowest expert group over a perfect spread; the
bound is `least_imbalance`, which holds for dynamic context parallelism too: packs of a row, joined, are one that the
whole row shares. The second table has packs that 1, 2, 4 or 8 of the GPUs share (`packing_shared.py`): their planned
seconds over a bound that is proved for packs of all sizes, and W. `static / bound` is the most that any packs could
gain. Exits 1 when a cell of the first misses its limit, or a bin exceeds its tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from packing_peers import PEERS, by_slot
from packing_shared import compare

from gspo_megatron.data.packing import imbalance, least_imbalance, pack

NUM_RANKS, MAX_TOKENS = 8, 131_072
SHAPES = {"math": (9_000, 1.0), "agent": (24_000, 0.75), "wide": (24_000, 1.25)}
"""Median and sigma of the lognormal lengths."""
MODELS = {"30B": (6.08e9, 393_216.0), "235B": (43.14e9, 1_540_096.0)}
"""Forward FLOPs: a token, and a token times the length of its sequence."""
LIMITS = {512: 1.01, 128: 1.03, 64: 1.05}
"""Sequences -> most of W over the bound, mean of a cell."""
SPANS = (1, 4, 8)
"""Data-parallel ranks that share one set of experts."""
MOST_MILLISECONDS = 50.0
"""Of processor time, the median of 512 sequences."""


def draw_lengths(shape: str, count: int, seed: int) -> list[int]:
    """Tokens of each sequence."""
    median, sigma = SHAPES[shape]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn, 64, 100_000).astype(int).tolist()


def measure(shape: str, model: str, count: int, span: int, seed: int) -> dict[str, Any]:
    """One draw: W of each packer, the bound, and what `pack` took."""
    lengths = draw_lengths(shape, count, seed)
    linear, quadratic = MODELS[model]

    def cost(length: int) -> float:
        return linear * length + quadratic * length**2

    costs = [cost(length) for length in lengths]
    begin = time.process_time()
    slots = pack(lengths, cost, NUM_RANKS, MAX_TOKENS, span)
    milliseconds = 1e3 * (time.process_time() - begin)
    others = {name: by_slot(peer(lengths, cost, NUM_RANKS, MAX_TOKENS)) for name, peer in PEERS.items()}
    packings = {"pack": slots, **others}
    return {
        "W": {name: imbalance(packing, costs, span) for name, packing in packings.items()},
        "fullest": {name: fullest_bin(packing, lengths) for name, packing in packings.items()},
        "bound": least_imbalance(lengths, costs, NUM_RANKS, MAX_TOKENS, span),
        "slots": len(slots),
        "milliseconds": milliseconds,
        "dynamic": compare(lengths, costs, model, NUM_RANKS, span, MAX_TOKENS, slots),
    }


def fullest_bin(slots: list[list[list[int]]], lengths: list[int]) -> int:
    """Tokens of the fullest bin."""
    return max(sum(lengths[index] for index in members) for slot in slots for members in slot)


def summarise(cell: tuple[str, str, int, int], draws: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell: means over its draws."""
    shape, model, count, span = cell
    relative = [draw["W"]["pack"] / draw["bound"] for draw in draws]
    names = draws[0]["W"]
    return {
        "lengths": shape,
        "model": model,
        "sequences": count,
        "ranks_per_expert_group": span,
        "W": round(float(np.mean([draw["W"]["pack"] for draw in draws])), 4),
        "bound": round(float(np.mean([draw["bound"] for draw in draws])), 4),
        "relative_mean": round(float(np.mean(relative)), 4),
        "relative_worst": round(max(relative), 4),
        "limit": LIMITS[count],
        "slots": round(float(np.mean([draw["slots"] for draw in draws])), 2),
        "milliseconds_median": round(float(np.median([draw["milliseconds"] for draw in draws])), 1),
        "bins_over_limit": {name: sum(draw["fullest"][name] > MAX_TOKENS for draw in draws) for name in names},
        "fullest_bin": {name: max(draw["fullest"][name] for draw in draws) for name in names},
        "W_others": {
            name: round(float(np.mean([draw["W"][name] for draw in draws])), 3) for name in names if name != "pack"
        },
        "dynamic": summarise_dynamic(draws, LIMITS[count]),
    }


def summarise_dynamic(draws: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Packs that fewer ranks may share: means over the draws of a cell."""
    found = {
        name: round(float(np.mean([draw["dynamic"][name] for draw in draws])), 4)
        for name in draws[0]["dynamic"]
        if name not in ("milliseconds", "fullest")
    }
    relative = [draw["dynamic"]["W"] / draw["bound"] for draw in draws]
    return found | {
        "relative_mean": round(float(np.mean(relative)), 4),
        "relative_worst": round(max(relative), 4),
        "limit": limit,
        "milliseconds_median": round(float(np.median([draw["dynamic"]["milliseconds"] for draw in draws])), 1),
        "bins_over_limit": sum(draw["dynamic"]["fullest"] > MAX_TOKENS for draw in draws),
    }


def describe_dynamic(row: dict[str, Any]) -> str:
    """One line of the second table."""
    found = row["dynamic"]
    cell = f"{row['lengths']} | {row['model']} | {row['sequences']} | {row['ranks_per_expert_group']}"
    miss = " MISSED" if found["relative_mean"] > found["limit"] else ""
    gap = found["seconds_over_bound"] - found["limit"]
    late = f" MISSED by {gap:.3f}" if gap > 0 else ""
    figures = f"{found['seconds_over_bound']:.3f}{late} | {found['relative_mean']:.3f}{miss} | {found['limit']:.2f}"
    figures += f" | {found['static_over_dynamic_seconds']:.2f} | {found['static_seconds_over_bound']:.2f}"
    figures += f" | {found['ranks_of_a_sequence']:.1f} | {found['bytes_over_static']:.2f} | {found['slots']:.1f}"
    figures += f" | {found['milliseconds_median']:.0f}"
    return f"| {cell} | {figures} |"


def is_missed(row: dict[str, Any]) -> bool:
    """Whether a cell exceeds its limit, or a bin its tokens."""
    return (
        row["relative_mean"] > row["limit"]
        or row["bins_over_limit"]["pack"] > 0
        or row["dynamic"]["bins_over_limit"] > 0
    )


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    others = " | ".join(f"{value:.2f}" for value in row["W_others"].values())
    cell = f"{row['lengths']} | {row['model']} | {row['sequences']} | {row['ranks_per_expert_group']}"
    relative = f"{row['relative_mean']:.4f} | {row['relative_worst']:.3f} | {row['limit']:.2f}"
    miss = " MISSED" if is_missed(row) else ""
    figures = f"{row['W']:.3f} | {row['bound']:.3f} | {relative}{miss} | {row['milliseconds_median']:.0f}"
    return f"| {cell} | {figures} | {row['slots']:.1f} | {others} |"


def main() -> int:
    """Print the table of data/NOTES.md, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--seeds", type=int, default=20, help="draws of each cell (default 20)")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| lengths | model | sequences | span | W | bound | W / bound | worst | limit | ms | slots |", end=" ")
        print(" | ".join(PEERS), "|\n|---|---|" + "---:|" * (9 + len(PEERS)))
    rows = []
    for cell in [(s, m, n, span) for s in SHAPES for m in MODELS for n in LIMITS for span in SPANS]:
        rows.append(summarise(cell, [measure(*cell, seed) for seed in range(arguments.seeds)]))
        if not arguments.json:
            print(describe(rows[-1]), flush=True)
    if not arguments.json:
        print("\n| lengths | model | sequences | span | time / bound | W / bound | limit | static / dynamic |", end=" ")
        print("static / bound | mean CP | CP bytes / static | slots | ms |\n|---|---|" + "---:|" * 11)
        print("\n".join(map(describe_dynamic, rows)))
    slow = [row for row in rows if row["sequences"] == 512 and row["milliseconds_median"] > MOST_MILLISECONDS]
    if arguments.json:
        print(json.dumps({"num_ranks": NUM_RANKS, "max_tokens": MAX_TOKENS, "cells": rows}, indent=1))
    print(f"{sum(map(is_missed, rows))} cells missed, {len(slow)} above {MOST_MILLISECONDS:.0f} ms", file=sys.stderr)
    return int(any(map(is_missed, rows)) or bool(slow))


if __name__ == "__main__":
    sys.exit(main())
