"""The jobs of the resume tests: recipes, interruptions, and what their run directories hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_megatron.run_log import read_rows

RANKS, STEPS = 2, 8
OVERRIDES = [
    "model.architecture.num_hidden_layers=2",
    "cold_start=null",
    "batch.prompts=8",
    "batch.answers=4",
    "batch.updates=2",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_tokens=128",
    "evaluation.every=0",
    "checkpoint.every=1",
    "checkpoint.export_every=3",
    "objective.replay=trainer",
    "optimizer.lr=1.0e-3",
]
LAYOUTS = {
    "TP2_EP2": [
        "trainer.tensor_parallel=2", "trainer.expert_parallel=2",
        "objective.preset=ppo", "critic.warmup_steps=2", "critic.lr=1.0e-2",
        "objective.kl=k2", "objective.kl_in=reward", "objective.kl_coefficient=0.1",
    ],
    "PP2": ["trainer.pipeline_parallel=2", "objective.kl=k3", "objective.kl_coefficient=0.1"],
}  # fmt: skip
"""Each with a reference policy, which a resumed run must find again; one with a critic."""


def whole_run(name: str) -> dict[str, Any]:
    """A job of resume_worker.py that nothing interrupts."""
    return {"ranks": RANKS, "overrides": [*OVERRIDES, *LAYOUTS[name]], "interruptions": []}


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without the clock."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_rows(run_dir)]
