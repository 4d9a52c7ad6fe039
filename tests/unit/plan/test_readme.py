"""The numbers of recipes/README.md are what the planner says today.

`python tests/unit/plan/test_readme.py` prints the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.rules import resources

README = Path("recipes/README.md")
GIB = 1 << 30
PLANNED = ("qwen3_0p6b_gspo", "qwen3_30b_a3b_gspo", "qwen3_30b_a3b_grpo_replay", "qwen3_30b_a3b_gspo_100k",
           "qwen3_235b_a22b_gspo", "qwen3_235b_a22b_gspo_100k")  # fmt: skip
SHORT = (
    "placement.nodes=4 placement.rollout_nodes=2 rollout.servers=8 rollout.max_prompt_tokens=1024 "
    "rollout.max_answer_tokens=3072 rollout.expected_answer_tokens=null trainer.context_parallel=1 "
    "trainer.micro_batch_tokens=4096 trainer.expert_parallel=16 trainer.recompute=none"
)
LONG = (
    "placement.gpu=h200 placement.nodes=2 placement.rollout_nodes=1 rollout.servers=2 rollout.max_prompt_tokens=1024 "
    "rollout.max_answer_tokens=64512 trainer.micro_batch_tokens=65536 trainer.context_parallel=1"
)
PUBLISHED = (
    ("Megatron-Bridge, 30B-A3B, 16 H100, EP 16, 4,096 tokens", "qwen3_30b_a3b_gspo", SHORT, 62.166),
    ("prime-rl, 30B-A3B, 8 H200, 65,536 tokens (shards with FSDP)", "qwen3_30b_a3b_gspo_100k", LONG, 105.4),
)
"""Peak of allocated memory, GiB, as published; the planner's nearest run."""


def planned_row(name: str) -> str:
    plan = make_plan(load_recipe(Path(f"recipes/{name}.yaml")))
    layout, servers, work, machine = plan.layout, plan.rollout, plan.compute, plan.machine
    assert layout is not None and servers is not None and work is not None and plan.memory is not None
    sizes = [("TP", layout.tensor), ("CP", layout.context), ("PP", layout.pipeline), ("EP", layout.expert)]
    cut = " ".join(f"{letters}{size}" for letters, size in (*sizes, ("DP", layout.data)) if size > 1) or "1 rank"
    fullest = max(moment.bytes for moment in resources.moments(plan.recipe, machine, plan.memory, servers))
    return (
        f"| `{name}` | planned | {machine.devices} {machine.device.kind.upper()} | {cut} | "
        f"{servers.servers} x {servers.devices_per_server} GPU | {work.seconds_per_step:,.0f} s | "
        f"{work.device_hours:,.0f} | {fullest / 1e9:.0f} of {machine.device.memory / 1e9:.0f} GB |"
    )


def allocated(stage: StageMemory) -> int:
    """What torch counts as allocated: without the process, NCCL, and the allocator's slack."""
    outside = ("process and NCCL", "sleeping server", "allocator slack")
    return stage.peak_bytes - sum(stage.estimated.get(name, 0) for name in outside)


def published_rows() -> Iterator[str]:
    for told, recipe, overrides, measured in PUBLISHED:
        plan = make_plan(load_recipe(Path(f"recipes/{recipe}.yaml"), overrides.split()))
        assert plan.memory is not None
        peak = max(map(allocated, plan.memory)) / GIB
        yield f"| {told} | {measured:.1f} GiB | {peak:.1f} GiB | {peak / measured - 1:+.1%} |"


@pytest.mark.parametrize("name", PLANNED)
def test_planned_rows_are_up_to_date(name: str) -> None:
    assert planned_row(name) in README.read_text()


def test_published_peaks_stand_beside_the_estimate() -> None:
    text = README.read_text()
    for row in published_rows():
        assert row in text, row


def test_no_row_is_both_measured_and_planned() -> None:
    for recipe in Path("recipes").glob("*.yaml"):
        rows = [line for line in README.read_text().splitlines() if line.startswith(f"| `{recipe.stem}` |")]
        assert len({line.split("|")[2].strip() for line in rows}) <= 1, recipe


if __name__ == "__main__":
    print("\n".join([*map(planned_row, PLANNED), *published_rows()]))
