"""What the long-tail policies are worth, on the real controller code in simulated time.

    python tools/simulate_rollout.py [--json | --fit]

Two tables: speed-ups that others measured, two fitted and four predicted; and the policies on two length distributions
beside the bound that no schedule can beat. `--fit` finds the two constants of the first anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from gspo_megatron.controller.group_buffer import GroupBuffer
from gspo_megatron.controller.groups import Group
from gspo_megatron.models import load_recipe
from tools.rollout_simulation import Scenario, simulate, work_conserving_seconds
from tools.simulated_engine import EngineModel, Lengths

RECIPE = "recipes/tiny_moe.yaml"
"""Only its schema is needed; sizes come from the scenario."""

# Qwen3-30B-A3B in bf16 on 4 H200 (TP4): 61 GB of weights and 98,304 bytes of KV a token at 11.5 TB/s (60 % of the
# data sheet), 5 ms of launches; 85 % of the memory less the weights holds 4.2 M tokens.
ENGINE = EngineModel(latency=0.0103, per_answer=1e-5, per_kv_token=8.5e-9, kv_tokens=4_200_000, slots=128)
DISTRIBUTIONS = {
    "math": Lengths(median=9_000, sigma=1.0, limit=102_400),
    "agent": Lengths(median=24_000, sigma=0.75, limit=102_400),
}
SYSTEM = {"engines": 2, "model": ENGINE, "prompts": 160, "answers": 16, "update_seconds": 3.0, "steps": 9, "warmup": 3}
"""1,280 answers an engine and step: a step is then longer than the longest answer, as the bound on staleness needs."""
TRAINER_SHARE = 0.5
"""Training seconds of a step over the seconds of sampling it at the best rate."""
POLICIES: dict[str, dict[str, Any]] = {
    "synchronous": {"overlaps": False},
    "over-provision 0.25, cut": {"overlaps": False, "over_provision": 0.25},
    "partial rollout, staleness 1": {"overlaps": False, "staleness": 1},
    "partial rollout, staleness 2": {"overlaps": False, "staleness": 2},
    "asynchronous, staleness 1": {"overlaps": True, "staleness": 1},
    "asynchronous, staleness 2": {"overlaps": True, "staleness": 2},
}


def compare_policies() -> Iterator[dict[str, Any]]:
    """Every policy on every distribution: seconds a step, and its share of the work-conserving bound."""
    recipe = load_recipe(Path(RECIPE), [])
    for name, lengths in DISTRIBUTIONS.items():
        draws = [lengths.of(prompt, sample) for prompt, sample in product(range(512), range(16))]
        resident = 256 + sum(length**2 for length in draws) / (2 * sum(draws))
        tokens = SYSTEM["prompts"] * SYSTEM["answers"] * sum(draws) / len(draws)
        train = TRAINER_SHARE * tokens / (SYSTEM["engines"] * ENGINE.peak_rate(resident))
        for policy, settings in POLICIES.items():
            scenario = Scenario(lengths=lengths, train_seconds=train, **SYSTEM, **settings)
            started = time.process_time()
            found = simulate(scenario, recipe)
            bound = work_conserving_seconds(scenario, found.tokens, draws)
            yield {
                "lengths": name,
                "policy": policy,
                **asdict(found),
                "bound_seconds": bound,
                "of_bound": bound / found.seconds,
                "cpu_seconds": time.process_time() - started,
            }


# verl's fully asynchronous trainer, Qwen2.5-Math-7B on H20, 512 prompts x 16 answers of up to 28K tokens a version
# (its docs/advance/fully_async.md): GPUs that sample, threshold, published seconds a step, and of these the trainer's.
# Read off the tables of the document; the trainer's seconds are given to the simulation, the sampling is predicted.
SYNCHRONOUS = {32: (790.10, 377.51), 64: (365.28, 203.67), 128: (356.30, 167.73)}
ASYNCHRONOUS = {
    "128 GPUs, threshold 0": (64, 0.0, 231.34, 98.77),
    "128 GPUs, threshold 0.5": (64, 0.5, 150.63, 113.16),
    "128 GPUs, threshold 0.1": (64, 0.1, 171.30, 109.12),
    "128 GPUs, threshold 0.3": (64, 0.3, 146.11, 103.22),
    "64 GPUs, threshold 0.5": (32, 0.5, 189.26, 156.98),
    "32 GPUs, threshold 0.5": (16, 0.5, 294.77, 313.81),
}
FITTED_ON = ("128 GPUs, threshold 0", "128 GPUs, threshold 0.5")
# 15.2 GB of weights at 3.2 TB/s and 4 ms of launches; 15 GFLOP a token at 74 TFLOP/s; 57 KB of KV a token.
H20 = EngineModel(latency=0.0088, per_answer=2e-4, per_kv_token=1.8e-8, kv_tokens=1_000_000, slots=256)
SHRUNK = 16
"""Prompts and GPUs are both divided by it; answers a GPU stay the same."""
MEDIAN, SIGMA = 1_500.0, 0.7
"""The two fitted constants: answer lengths, which the document does not give."""


class StreamingPool(GroupBuffer):
    """verl's rule: a version begins so many prompts, less what is left over; what is complete first is trained on."""

    share = 0.0

    def _choose(self) -> list[Group] | None:
        complete = [group for group in self.groups if group.is_complete]
        return complete[: self._size] if len(complete) >= self._size else None

    async def _leave_off(self) -> None:
        await self._admit()

    async def _admit(self) -> None:
        version = self._version()
        consumed = self.accounting.taken["prompts"]
        allowed = 4 * self._size * ((version or 0) + 1 + self.share) - consumed
        async with self.admitting:
            missing = math.ceil(allowed) - len(self.groups)
            if missing > 0:
                self._begin(await self._draw(missing))


def predict_published(median: float, sigma: float, rows: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Speed-ups over the synchronous run on as many GPUs: published and simulated."""
    recipe = load_recipe(Path(RECIPE), [])
    lengths = Lengths(median, sigma, 28_672)
    shape = {"model": H20, "lengths": lengths, "answers": 16, "update_seconds": 5.0, "steps": 8, "warmup": 3}
    for name in rows:
        gpus, threshold, seconds, train = ASYNCHRONOUS[name]
        slow, training = SYNCHRONOUS[2 * gpus]
        prompts = 512 // SHRUNK
        whole = Scenario(engines=2 * gpus // SHRUNK, prompts=prompts, train_seconds=training, overlaps=False, **shape)
        pool = type("Streaming", (StreamingPool,), {"share": threshold})
        engines, piece = gpus // SHRUNK, prompts // 4
        split = replace(
            whole, engines=engines, prompts=piece, pieces=4, train_seconds=train, overlaps=True, staleness=99
        )
        predicted = simulate(whole, recipe).seconds / simulate(split, recipe, pool).seconds
        published = slow / seconds
        yield {
            "row": name,
            "fitted": name in FITTED_ON,
            "published": published,
            "simulated": predicted,
            "error": predicted / published - 1,
        }


def fit() -> dict[str, float]:
    """Median and spread of the lengths that give the two published speed-ups best."""
    best: tuple[float, float, float] = (math.inf, 0.0, 0.0)
    for median, sigma in product((700.0, 1_000.0, 1_500.0, 2_200.0, 3_200.0), (0.7, 1.0, 1.3)):
        wrong = sum(abs(math.log(1 + row["error"])) for row in predict_published(median, sigma, FITTED_ON))
        print(f"median {median:.0f} sigma {sigma:.1f}: {wrong:.3f}", flush=True)
        best = min(best, (wrong, median, sigma))
    return {"median": best[1], "sigma": best[2]}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one object instead of tables")
    output.add_argument("--fit", action="store_true", help="find the constants of the first table")
    arguments = parser.parse_args()
    if arguments.fit:
        print(fit())
        return
    tables = {"published": predict_published(MEDIAN, SIGMA, tuple(ASYNCHRONOUS)), "policies": compare_policies()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}
    for name, rows in tables.items():
        for row in rows:
            found[name].append(row)
            if not arguments.json:
                print(
                    "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"system": _system(), **found}, indent=1))


def _system() -> dict[str, Any]:
    return {
        "engine": asdict(ENGINE),
        "lengths": {name: asdict(lengths) for name, lengths in DISTRIBUTIONS.items()},
        **{key: value for key, value in SYSTEM.items() if key != "model"},
        "trainer_share": TRAINER_SHARE,
    }


if __name__ == "__main__":
    main()
