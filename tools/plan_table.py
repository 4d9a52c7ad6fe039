"""Plan runs whose speed or memory was published, and print planned / measured for each (`make plan-table`).

python tools/plan_table.py          # the table
python tools/plan_table.py --write  # and write it to tools/results/plan_table.md
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gspo_megatron.models import load_recipe
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.rollout import decode_seconds
from gspo_megatron.plan.run_plan import Plan, make_plan

ROOT = Path(__file__).parents[1]
RUNS, TARGET = ROOT / "tools/published_runs.yaml", ROOT / "tools/results/plan_table.md"
UNITS = {"trainer": "tokens/s per GPU", "step": "s per step", "decode": "ms per token", "memory": "GiB"}
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """A published run."""

    name: str
    kind: str
    """`trainer`, `step`, `decode` or `memory`."""
    measured: float
    """In the unit of `UNITS`."""
    band: float | None
    """Largest |planned / measured - 1| that the test accepts; None = not comparable."""
    source: str
    recipe: str
    """Name of a shipped recipe."""
    overrides: list[str]
    differs: dict[str, Any] = field(default_factory=dict)
    """What the run's trainer does otherwise than this one."""
    note: str = ""
    counted: str = "allocated"
    """Of memory: `static` (between steps), `allocated` (torch), `device` (all)."""
    batch: int = 0
    """Of decoding: responses at a time."""
    context: float = 0
    """Of decoding: tokens of a response so far."""

    def plan(self) -> Plan:
        """Plan the run."""
        overrides = shlex.split(" ".join(self.overrides))
        return make_plan(load_recipe(ROOT / f"recipes/{self.recipe}.yaml", overrides))

    def planned(self) -> float:
        """Return what the plan says, in the unit of the kind."""
        plan = self.plan()
        assert plan.batch is not None and plan.compute is not None and plan.memory is not None, plan.findings
        if self.kind == "trainer":
            return plan.batch.expected_tokens_per_batch / plan.compute.seconds["training"] / plan.machine.ranks
        if self.kind == "step":
            return plan.compute.seconds_per_step
        if self.kind == "decode":
            return 1e3 * decode_seconds(plan.recipe, plan.recipe.arch, plan.machine, self.batch, self.context)
        return max(held_bytes(stage, self.counted) for stage in plan.memory) / GIB


def held_bytes(stage: StageMemory, counted: str) -> int:
    """Return the bytes of a stage that a published figure counts."""
    if counted == "static":
        return stage.static_bytes
    # Outside the counters of torch: the process, NCCL, and what its allocator caches.
    outside = ["sleeping server", *(["process and NCCL", "allocator slack"] if counted == "allocated" else [])]
    return stage.peak_bytes - sum(stage.estimated.get(name, 0) for name in outside)


def read_runs() -> list[Run]:
    """Read the table of runs."""
    return [Run(**row) for row in yaml.safe_load(RUNS.read_text())["runs"]]


def lines(runs: list[Run]) -> Iterator[str]:
    """Yield the table, a section a kind."""
    for kind, unit in UNITS.items():
        yield f"## {kind.capitalize()}, {unit}"
        yield "| run | measured | planned | planned / measured | band |"
        yield "|---|---|---|---|---|"
        for run in runs:
            if run.kind == kind:
                planned = run.planned()
                band = f"{run.band:.0%}" if run.band else f"none: {run.note}"
                ratio = planned / run.measured
                yield f"| {run.name} | {run.measured:,g} | {planned:,.4g} | {ratio:.2f} | {band} |"
        yield ""


def main() -> None:
    """Print the table, and write it on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.relative_to(ROOT)}")
    arguments = parser.parse_args()
    text = "# Planned beside published\n\n" + "\n".join(lines(read_runs()))
    print(text)
    if arguments.write:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
