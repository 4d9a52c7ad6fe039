"""The shipped recipes on each of the machines that their comments name, as (recipe, overrides)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.search import search

CHOSEN = (
    ("qwen3_0p6b_gspo", ""),
    ("qwen3_0p6b_gspo", "placement.gpu=h200"),
    ("qwen3_30b_a3b_gspo", ""),
    ("qwen3_30b_a3b_grpo_replay", ""),
    ("qwen3_30b_a3b_gspo_100k", ""),
    ("qwen3_30b_a3b_gspo_100k", "placement.nodes=4 rollout.tensor_parallel=2"),
    ("qwen3_30b_a3b_gspo_100k", "placement.gpu=h200 placement.nodes=4 rollout.tensor_parallel=2"),
    (
        "qwen3_30b_a3b_gspo_100k",
        "placement.gpu=h200 placement.nodes=2 rollout.servers=8 rollout.tensor_parallel=2 trainer.context_parallel=2",
    ),
    ("qwen3_235b_a22b_gspo", ""),
    (
        "qwen3_235b_a22b_gspo",
        "placement.gpu=h100 rollout.pipeline_parallel=2 rollout.servers=8 trainer.recompute=selective",
    ),
    ("qwen3_235b_a22b_gspo_100k", ""),
    (
        "qwen3_235b_a22b_gspo_100k",
        "placement.nodes=8 rollout.servers=8 trainer.context_parallel=2 trainer.virtual_pipeline=6 "
        "trainer.recompute=full",
    ),
    (
        "qwen3_235b_a22b_gspo_100k",
        "placement.nodes=32 rollout.servers=32 trainer.context_parallel=8 trainer.recompute=none",
    ),
    (
        "qwen3_235b_a22b_gspo_100k",
        "placement.gpu=h100 rollout.pipeline_parallel=2 rollout.servers=8 trainer.recompute=full",
    ),
    (
        "qwen3_235b_a22b_gspo_100k",
        "placement.gpu=h100 placement.nodes=32 rollout.pipeline_parallel=2 trainer.context_parallel=8",
    ),
)


def choice(name: str, overrides: str) -> tuple[float, str]:
    """Return planned seconds over those of the fastest step found, and the row of recipes/README.md."""
    recipe = load_recipe(Path(f"recipes/{name}.yaml"), overrides.split())
    plan, found = make_plan(recipe), search(recipe)[0]
    assert plan.compute is not None
    mine = {f"trainer.{key}": value for key, value in recipe.trainer.model_dump().items()}
    mine |= {f"rollout.{key}": value for key, value in recipe.rollout.model_dump().items()}
    second = {**found.layouts[0].change, **found.servers[0].change}
    if _words(second) == _words(mine) and len(found.layouts) > 1:
        second = {**found.layouts[1].change, **found.servers[0].change}
    ratio = plan.compute.seconds_per_step / found.seconds
    machine = plan.machine
    row = (
        f"| `{name}` | {machine.devices} {machine.device.kind.upper()} | {_words(mine)} | "
        f"{plan.compute.seconds_per_step:,.0f} | {ratio:.2f} | {_words(second)} |"
    )
    return ratio, row


def _words(change: Mapping[str, Any]) -> str:
    sizes = [
        (letters, change[f"trainer.{key}"] or 1)
        for letters, key in (
            ("TP", "tensor_parallel"), ("CP", "context_parallel"), ("PP", "pipeline_parallel"),
            ("VPP", "virtual_pipeline"), ("EP", "expert_parallel"), ("ETP", "expert_tensor_parallel"),
        )
    ]  # fmt: skip
    words = [f"{letters}{size}" for letters, size in sizes if size > 1]
    words += [kind] if (kind := change.get("trainer.megatron.cp_comm_type")) else []
    host = ["host"] if change["trainer.offload_activations"] else []
    gpus = change["rollout.tensor_parallel"] * change["rollout.pipeline_parallel"]
    return " ".join([*words, change["trainer.recompute"], *host]) + f"; {change['rollout.servers']} x {gpus}"


if __name__ == "__main__":
    for chosen in CHOSEN:
        print(choice(*chosen)[1])
