"""A run that is interrupted again and again ends with the same bits as one that is not, given the same rollouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.data.log_ratios import find_log_ratios
from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.run_dir import RunDir
from tests.parallel.resume_runs import LAYOUTS, RANKS, STEPS, rows_of, whole_run
from tests.parallel.world import run_world

STRIKES = 6
"""Interruptions of each run. At most one step is saved before each, so all of them come before the last step."""
STAGES = 12
"""An interruption comes within so many stages of the start of a step; a step has a few more."""


def draw_interruptions(draw: random.Random) -> list[dict[str, Any]]:
    """Kills in the first or second step of an attempt, requests to stop in the first: each saves at most one step."""
    kinds = [kind for _ in range(STRIKES // 2) for kind in draw.sample(["KILL", "USR1"], 2)]
    drawn = [
        {
            "kind": kind,
            "rank": draw.randrange(RANKS),
            "step": draw.choice((1, 2)) if kind == "KILL" else 1,
            "stage": draw.randrange(STAGES),
        }
        for kind in kinds
    ]
    # A checkpoint is being written when the next step starts.
    drawn[kinds.index("KILL")] |= {"step": 2, "stage": 0}
    return drawn


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    draw = random.Random(7)
    whole = {f"{name}-whole": whole_run(name) for name in LAYOUTS}
    interrupted = {
        f"{name}-interrupted": whole_run(name) | {"interruptions": draw_interruptions(draw)} for name in LAYOUTS
    }
    run_world("resume_worker.py", 1, whole | interrupted, place)
    return place


def test_every_interruption_came_and_both_kinds_did(directory: Path) -> None:
    for name in LAYOUTS:
        history = json.loads((directory / f"{name}-interrupted" / "history.json").read_text())
        struck = [entry for entry in history if entry["struck"] and set(entry["codes"]) != {0}]
        assert len(struck) == STRIKES == len(history) - 1
        assert {entry["interruption"]["kind"] for entry in struck} == {"KILL", "USR1"}


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
def test_what_the_passes_said_of_the_responses_is_stored_beside_them(name: str, directory: Path) -> None:
    """Of every response; their clipped shares are the logged ones, and an interrupted run stores the same."""
    places = {kind: RunDir(directory / f"{name}-{kind}").samples for kind in ("whole", "interrupted")}
    rows = rows_of(directory / f"{name}-whole")
    for step in range(1, STEPS + 1):
        whole, interrupted = (find_log_ratios(samples, step) for samples in places.values())
        assert len(whole) == 32 and whole.keys() == interrupted.keys()
        assert all(one.read().tobytes() == interrupted[key].read().tobytes() for key, one in whole.items())
        for side in ("left", "right"):
            mean = sum(getattr(one, side) for one in whole.values()) / 32
            assert mean == pytest.approx(rows[step][f"clip_{side}_sequences"], abs=1e-6)


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
    places = [(one.step, one.ref.prompt_index, one.ref.sample_index) for one in read_samples(RunDir(run_dir).samples)]
    assert places == [(1 + index // 8, index, sample) for index in range(STEPS * 8) for sample in range(4)]
