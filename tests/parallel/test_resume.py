"""A run that is interrupted again and again ends with the same bits as one that is not, given the same rollouts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import read_rows
from tests.parallel.world import run_world

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
        "objective.kl=k2", "objective.kl_in=reward", "objective.kl_coefficient=0.1",
    ],
    "PP2": ["trainer.pipeline_parallel=2", "objective.kl=k3", "objective.kl_coefficient=0.1"],
}  # fmt: skip
"""Each with a reference policy, which a resumed run must find again."""
ENOUGH, PLANNED = 10, 16
"""Interruptions that must have come before the end of a run, and those that are planned for."""


def whole_run(directory: Path, name: str) -> dict:
    return {"ranks": RANKS, "overrides": [*OVERRIDES, *LAYOUTS[name]], "interruptions": []}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    run_world("resume_worker.py", 1, {f"{name}-whole": whole_run(place, name) for name in LAYOUTS}, place)
    histories = [json.loads((place / f"{name}-whole" / "history.json").read_text()) for name in LAYOUTS]
    shortest = min(only["seconds"] for (only,) in histories)
    draw = random.Random(7)
    cases = {}
    for name in LAYOUTS:
        moments = [
            {
                "kind": kind,
                "rank": draw.randrange(RANKS),
                # The first tenth is start-up, where nothing is to be lost.
                "after": shortest * draw.uniform(0.1, 0.4),
            }
            for kind in draw.sample(["KILL", "USR1"], 2) * (PLANNED // len(LAYOUTS) // 2)
        ]
        cases[f"{name}-interrupted"] = whole_run(place, name) | {"interruptions": moments}
    run_world("resume_worker.py", 1, cases, place)
    return place


def test_the_runs_were_interrupted_often_enough_and_in_both_ways(directory: Path) -> None:
    histories = [json.loads((directory / f"{name}-interrupted" / "history.json").read_text()) for name in LAYOUTS]
    struck = [
        [entry for entry in history if entry["interruption"] is not None and set(entry["codes"]) != {0}]
        for history in histories
    ]
    assert all({entry["interruption"]["kind"] for entry in entries} == {"KILL", "USR1"} for entries in struck)
    assert sum(len(entries) for entries in struck) >= ENOUGH


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_optimizer_and_counters_end_with_the_same_bits(name: str, directory: Path) -> None:
    for rank in range(RANKS):
        whole, interrupted = (
            json.loads((directory / f"{name}-{kind}" / f"final-{rank}.json").read_text())
            for kind in ("whole", "interrupted")
        )
        assert interrupted == whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_step_is_recorded_once_with_the_same_numbers(name: str, directory: Path) -> None:
    whole, interrupted = (rows_of(directory / f"{name}-{kind}") for kind in ("whole", "interrupted"))
    assert [row["step"] for row in whole] == list(range(STEPS + 1))
    assert interrupted == whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_policy_moves_away_from_the_reference(name: str, directory: Path) -> None:
    metric = "reference_kl" if name == "PP2" else "reference_charge"
    moved = [row[metric] for row in rows_of(directory / f"{name}-whole")[1:]]
    assert 0 <= moved[0] < moved[-1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_newest_checkpoints_and_every_export_stay(name: str, directory: Path) -> None:
    run_dir = directory / f"{name}-interrupted"
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["hugging_face_000003", "hugging_face_000006", "step_000007", "step_000008"]
    assert len(list(RunDir(run_dir).samples.glob("*.sample"))) == STEPS * 8 * 4


def rows_of(run_dir: Path) -> list[dict]:
    """Metrics without the clock."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_rows(run_dir)]
