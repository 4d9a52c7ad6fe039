"""Measure how evenly `pack` distributes long-tailed lengths: `python tools/benchmark_packing.py`.

8 data-parallel ranks, at most 131,072 tokens per bin, costs of Qwen3-30B-A3B, 10 seeds. Lengths: `math` is lognormal
with median 9K and sigma 1.0, `agent` with median 24K and sigma 0.75, both cut at 100K. W is the time of the slowest
expert group over the time of a perfect distribution. Its lower bound is max(1, costliest sequence / mean of a rank).
"""

from __future__ import annotations

import time

import numpy as np

from gspo_megatron.data.packing import imbalance, pack

NUM_RANKS, MAX_TOKENS, SEEDS = 8, 131_072, range(10)
SHAPES = {"math": (9_000, 1.0), "agent": (24_000, 0.75)}
CASES = (("math", 512, 1), ("math", 512, 4), ("math", 512, 8), ("math", 128, 4), ("agent", 512, 4), ("agent", 128, 4))


def draw_lengths(shape: str, count: int, seed: int) -> list[int]:
    """Draw the tokens of each sequence."""
    median, sigma = SHAPES[shape]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn, 64, 100_000).astype(int).tolist()


def cost(length: int) -> float:
    """Return the forward FLOPs of a sequence: linear layers, and the quadratic part of causal attention."""
    return 6.08e9 * length + 393_216.0 * length**2


def measure(shape: str, count: int, span: int, seed: int) -> tuple[float, float, float]:
    """Return W, W over its lower bound, and seconds."""
    lengths = draw_lengths(shape, count, seed)
    costs = [cost(length) for length in lengths]
    began = time.perf_counter()
    slots = pack(lengths, cost, NUM_RANKS, MAX_TOKENS, span)
    seconds = time.perf_counter() - began
    reached = imbalance(slots, costs, span)
    return reached, reached / max(1.0, max(costs) / (sum(costs) / NUM_RANKS)), seconds


def main() -> None:
    """Print the table of gspo_megatron/data/NOTES.md."""
    print("| lengths | sequences | ranks per expert group | W mean | W worst | W / bound, mean | ms |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for shape, count, span in CASES:
        reached, relative, seconds = np.array([measure(shape, count, span, seed) for seed in SEEDS]).T
        figures = f"{reached.mean():.3f} | {reached.max():.3f} | {relative.mean():.3f} | {1e3 * np.median(seconds):.0f}"
        print(f"| {shape} | {count} | {span} | {figures} |")


if __name__ == "__main__":
    main()
