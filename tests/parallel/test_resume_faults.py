"""What a run does about a rank that stands still and about numbers that are none: it goes on, or ends in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_megatron.trainer.failure_replay import replay_bundle
from tests.parallel.resume_runs import RANKS, STEPS, rows_of, whole_run
from tests.parallel.world import run_world

BASE = whole_run("PP2")
STANDSTILL = {"kind": "STOP", "rank": 1, "step": 4, "stage": 3}
CASES = {
    "whole": BASE,
    "stopped": BASE | {"watchdog": 2.0, "interruptions": [STANDSTILL]},
    "poisoned": BASE | {"poison": [3]},
    "full_disk": BASE | {"full_disk": 1, "fails": True},
    "replaced": BASE | {"newest_attempt": 2, "environment": {"GSPO_ATTEMPT": "1"}, "fails": True},
    "hopeless": BASE | {"poison": [3, 4, 5], "overrides": [*BASE["overrides"], "trainer.max_skipped=2"], "fails": True},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    run_world("resume_worker.py", 1, CASES, place)
    return place


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_the_same_bits(directory: Path) -> None:
    history = json.loads((directory / "stopped" / "history.json").read_text())
    assert history[0]["codes"] == [1, -9], "the other rank ended the attempt, the stopped one was killed"
    said = (directory / "stopped" / "rank-0-0.log").read_text()
    assert "trainer-1 is silent" in said and "stacks of trainer-0" in said and "loop.py" in said
    for rank in range(RANKS):
        stopped, whole = (json.loads((directory / n / f"final-{rank}.json").read_text()) for n in ("stopped", "whole"))
        assert stopped == whole


def test_an_update_that_is_no_number_is_skipped_on_every_rank_and_kept(directory: Path) -> None:
    run_dir = directory / "poisoned"
    finals = [json.loads((run_dir / f"final-{rank}.json").read_text()) for rank in range(RANKS)]
    whole = json.loads((directory / "whole" / "final-0.json").read_text())
    assert [final["skipped"] for final in finals] == [1] * RANKS
    assert all(final["updates"] == whole["updates"] for final in finals)
    rows = rows_of(run_dir)
    assert [row["skipped_updates"] for row in rows[1:]] == [0, *[1] * (STEPS - 1)]
    assert rows[2]["nonfinite_tokens"] > 0 and rows[3]["nonfinite_tokens"] == 0
    said = replay_bundle(run_dir / "alarms" / "update_000003")
    assert "update 3:" in said and "is skipped on every rank" in said and "logprobs nan" in said


def test_too_many_in_a_row_end_the_run_in_a_sentence(directory: Path) -> None:
    (only,) = json.loads((directory / "hopeless" / "history.json").read_text())
    assert 1 in only["codes"]
    log = (directory / "hopeless" / "rank-0-0.log").read_text()
    assert "3 updates in a row had gradients that are not finite, trainer.max_skipped=2" in log


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("full_disk", "trainer rank 1 could not save: [Errno 27] File too large"),
        ("replaced", "trainer rank 0 could not save: attempt 1 was replaced by attempt 2"),
    ],
)
def test_a_save_that_fails_publishes_nothing_and_ends_in_its_sentence(
    directory: Path, case: str, sentence: str
) -> None:
    (only,) = json.loads((directory / case / "history.json").read_text())
    assert only["codes"] != [0, 0]
    assert sentence in (directory / case / "rank-0-0.log").read_text()
    left = list((directory / case / "checkpoints").iterdir())
    assert all(path.name.endswith(".partial") for path in left)
    assert not list((directory / case).rglob("*.unfinished")), "a full disk gets its bytes back"
