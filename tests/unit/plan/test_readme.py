"""The numbers of recipes/README.md are what the planner says today.

`python tests/unit/plan/test_readme.py` prints the rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.rules import resources
from gspo_megatron.plan.units import between

README = Path("recipes/README.md")
PLANNED = ("qwen3_0p6b_gspo", "qwen3_30b_a3b_gspo", "qwen3_30b_a3b_grpo_replay", "qwen3_30b_a3b_gspo_100k",
           "qwen3_235b_a22b_gspo", "qwen3_235b_a22b_gspo_100k")  # fmt: skip


def planned_row(name: str) -> str:
    plan = make_plan(load_recipe(Path(f"recipes/{name}.yaml")))
    layout, servers, work, machine = plan.layout, plan.rollout, plan.compute, plan.machine
    assert layout is not None and servers is not None and work is not None and plan.memory is not None
    sizes = [("TP", layout.tensor), ("CP", layout.context), ("PP", layout.pipeline), ("EP", layout.expert)]
    cut = " ".join(f"{letters}{size}" for letters, size in (*sizes, ("DP", layout.data)) if size > 1) or "1 rank"
    fullest = max(moment.bytes for moment in resources.moments(plan.recipe, machine, plan.memory, servers))
    return (
        f"| `{name}` | planned | {machine.devices} {machine.device.kind.upper()} | {cut} | "
        f"{servers.servers} x {servers.devices_per_server} GPU | {between(work.seconds_per_step, work.range, 's')} | "
        f"{between(work.device_hours, work.range, '').strip()} | "
        f"{fullest / 1e9:.0f} of {machine.device.memory / 1e9:.0f} GB |"
    )


@pytest.mark.parametrize("name", PLANNED)
def test_planned_rows_are_up_to_date(name: str) -> None:
    assert planned_row(name) in README.read_text()


def test_no_row_is_both_measured_and_planned() -> None:
    for recipe in Path("recipes").glob("*.yaml"):
        rows = [line for line in README.read_text().splitlines() if line.startswith(f"| `{recipe.stem}` |")]
        assert len({line.split("|")[2].strip() for line in rows} & {"planned", "measured"}) <= 1, recipe


if __name__ == "__main__":
    print("\n".join(map(planned_row, PLANNED)))
