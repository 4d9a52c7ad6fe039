"""The main job for three steps in six layouts, on the same recorded rollouts: the loop, not only the policy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gspo_megatron.run_log import read_rows
from tests.parallel.world import run_world

STEPS = 3
OVERRIDES = [
    "model.architecture.num_hidden_layers=2",
    "cold_start=null",
    "batch.prompts=8",
    "batch.answers=4",
    "batch.updates=1",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_tokens=128",
    "evaluation.every=0",
    # With its own log-probs the first loss is minus the mean advantage, which is 0 whatever the model computes.
    "objective.ratio_reference=sampler",
]
LAYOUTS = {
    "data parallel": [],
    "tensor parallel": ["trainer.tensor_parallel=2"],
    "pipeline parallel": ["trainer.pipeline_parallel=2"],
    "expert parallel": ["trainer.expert_parallel=2"],
    "context parallel": ["trainer.context_parallel=2"],
    "dynamic context parallel": ["trainer.context_parallel=2", "trainer.dynamic_context_parallel=true"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    place = tmp_path_factory.mktemp("jobs")
    cases = {
        name: {"ranks": 2, "overrides": [*OVERRIDES, *layout], "interruptions": []} for name, layout in LAYOUTS.items()
    }
    run_world("resume_worker.py", 1, cases, place)
    for name in LAYOUTS:
        (attempt,) = json.loads((place / name / "history.json").read_text())
        assert attempt["codes"] == [0, 0]
    return {name: rows_of(place / name) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_job_runs_three_steps_in_every_layout(rows: dict[str, list[dict]], name: str) -> None:
    assert [row["step"] for row in rows[name]] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows[name])


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_the_first_step_is_the_same_in_every_layout(rows: dict[str, list[dict]], name: str) -> None:
    first, plain = rows[name][0], rows["data parallel"][0]
    assert abs(plain["loss"]) > 1e-3
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def rows_of(run_dir: Path) -> list[dict]:
    """Of the steps that trained."""
    return [row for row in read_rows(run_dir) if "grad_norm" in row]
