"""Published runs as `Run` objects, what the plan says of them, and the fit of the plan's free constants to them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

import yaml

from gspo_megatron.models import load_recipe
from gspo_megatron.plan.estimate import decode
from gspo_megatron.plan.estimate.calibration import CALIBRATED, Rates, constants
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.practice import Practice
from gspo_megatron.plan.estimate.rollout import plan_rollout
from gspo_megatron.plan.estimate.step_time import plan_compute
from gspo_megatron.plan.estimate.trainer_time import trainer_times
from gspo_megatron.plan.run_plan import Plan, make_plan

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "tools/published_runs.yaml"
UNITS = {
    "trainer": "tokens/s per GPU",
    "scoring": "tokens/s per GPU",
    "step": "s per step",
    "decode": "ms per token",
    "memory": "GiB",
}
TIMED = ("trainer", "step")
"""Kinds that constants are fitted to; each kind has its own."""
OF_STEPS = ("request_seconds", "far_sum_seconds", "turn_seconds")
"""Fitted constants that only a whole step depends on."""
GIB = 1 << 30


@dataclass(frozen=True)
class Run:
    """A published run."""

    name: str
    kind: str
    """A key of `UNITS`."""
    measured: float
    band: float | None
    """Largest |planned / measured - 1| that the test accepts; None = not comparable."""
    source: str
    recipe: str
    """Name of a shipped recipe."""
    overrides: list[str]
    differs: dict[str, Any] = field(default_factory=dict)
    """What the run's trainer does otherwise than this one: fields of `Practice`."""
    note: str = ""
    counted: str = "allocated"
    """Of memory: `static` (between steps), `allocated` (torch), `device` (all)."""
    batch: int = 0
    """Of decoding: responses at a time."""
    context: float = 0
    """Of decoding: tokens of a response so far."""

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run as if this repository did it."""
        overrides = shlex.split(" ".join(self.overrides))
        return make_plan(load_recipe(ROOT / f"recipes/{self.recipe}.yaml", overrides))

    def planned(self, rates: Rates = CALIBRATED) -> float:
        """Return what the plan says of the run as it was done, in the unit of its kind."""
        plan, practice = self.plan, Practice(rates=rates, **self.differs)
        recipe, arch, where = plan.recipe, plan.recipe.arch, plan.machine
        assert plan.batch is not None and plan.layout is not None and plan.memory is not None, plan.findings
        if self.kind in ("trainer", "scoring"):
            part = {"trainer": "training", "scoring": "old log-probs"}[self.kind]
            seconds = trainer_times(recipe, plan.layout, plan.batch, where, practice)[part].seconds
            return plan.batch.expected_tokens_per_batch / seconds / where.ranks
        if self.kind == "step":
            servers = plan_rollout(recipe, arch, plan.batch, where, practice)
            work = plan_compute(recipe, arch, plan.layout, plan.batch, servers, plan.memory, where, practice)
            return work.seconds_per_step
        if self.kind == "decode":
            return 1e3 * decode.step_seconds(recipe, arch, where, self.batch, self.context, practice)
        logits = _logit_bytes(plan) if practice.whole_logits else 0
        held = [held_bytes(stage, self.counted, practice, 0) for stage in plan.memory[:-1]]
        return max([*held, held_bytes(plan.memory[-1], self.counted, practice, logits)]) / GIB

    def ratio(self, rates: Rates = CALIBRATED) -> float:
        """Return planned / measured."""
        return self.planned(rates) / self.measured


def _logit_bytes(plan: Plan) -> int:
    """Return the bytes of a micro-batch's logits in bfloat16 and in float32, and of their gradient."""
    assert plan.layout is not None
    tokens = plan.recipe.trainer.micro_batch_tokens / plan.layout.context
    return int(10 * tokens * plan.recipe.arch.vocab_size / plan.layout.tensor)


def held_bytes(stage: StageMemory, counted: str, practice: Practice, logits: int) -> int:
    """Return the bytes of a stage that a published figure counts.

    Args:
        logits: bytes that its head holds, instead of this repository's head.
    """
    gradients = sum(size for name, size in stage.exact.items() if "gradients" in name)
    saved = gradients * (4 - practice.gradient_bytes) // 4
    if counted == "static":
        return stage.static_bytes - saved
    # Outside the counters of torch: the process, NCCL, and what its allocator caches.
    outside = ["sleeping server", *(["process and NCCL", "allocator slack"] if counted == "allocated" else [])]
    work = stage.estimated.get("head", stage.estimated.get("one layer at work", 0))
    more = max(0, logits - work) - saved
    return stage.peak_bytes + more - sum(stage.estimated.get(name, 0) for name in outside)


def read_runs() -> list[Run]:
    """Read the table of runs."""
    return [Run(**row) for row in yaml.safe_load(RUNS.read_text())["runs"]]


def fitted_to(kind: str) -> list[str]:
    """Return the constants that runs of a kind determine."""
    free = [name for name, fact in constants() if fact["fitted"]]
    return [name for name in free if (name in OF_STEPS) == (kind == "step")]


def fit(runs: Sequence[Run], kind: str, start: Rates = CALIBRATED) -> Rates:
    """Return the constants, within their ranges, with the least sum of squared log ratios: one coordinate at a time."""
    names = fitted_to(kind)
    limits = {name: (fact["low"], fact["high"]) for name, fact in constants() if name in names}
    chosen = [run for run in runs if run.kind == kind and run.band]
    rates, best = start, _error(chosen, start)
    steps = {name: (high - low) / 4 for name, (low, high) in limits.items()}
    for _ in range(14):
        for name, (low, high) in limits.items():
            for step in (steps[name], -steps[name]):
                tried = replace(rates, **{name: min(high, max(low, getattr(rates, name) + step))})
                error = _error(chosen, tried)
                if error < best - 1e-9:
                    rates, best = tried, error
                    break
            else:
                steps[name] *= 0.6
    return rates


def _error(runs: Sequence[Run], rates: Rates) -> float:
    return sum(log(run.ratio(rates)) ** 2 for run in runs)


def left_out(runs: Sequence[Run], run: Run) -> float:
    """Return planned / measured with constants that were fitted without the run."""
    if run.kind not in TIMED or not run.band:
        return run.ratio()
    return run.ratio(fit([one for one in runs if one is not run], run.kind))
