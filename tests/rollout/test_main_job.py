"""The main job for three steps, with every process real; and the end of the job when one of its processes dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.rollout.jobs import (
    CONTROLLER,
    SERVER,
    TRAINER,
    assert_all_ended,
    finish,
    processes_of,
    processes_with,
    rows_of,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("main_job")
    job = start(directory, "reward.name=tests/rollout/own_reward.py:score", "reward.weights={right: 1}")
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    return directory, said


def test_three_steps_leave_everything_that_is_promised(finished: tuple[Path, str]) -> None:
    directory, said = finished
    run = directory / "run"
    assert [row["step"] for row in rows_of(directory)[1:]] == [1, 2, 3]
    for name in (
        "recipe.resolved.yaml",
        "objective.txt",
        "accuracy.png",
        "report.html",
        "DONE",
        "logs/attempt_1/trainer-1.log",
    ):
        assert (run / name).is_file(), name
    assert (run / "checkpoints" / "final" / "model.safetensors.index.json").is_file()
    assert list((run / "tensorboard").iterdir())
    assert (run / "objective.txt").read_text().strip() in said
    assert_all_ended(directory)


def test_the_first_mini_batch_has_not_moved_and_later_ones_have(finished: tuple[Path, str]) -> None:
    trained = [row for row in rows_of(finished[0])[1:] if row["zero_variance_groups"] < 1]
    for row in rows_of(finished[0])[1:]:
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
        assert row["clip_fraction_sequences/minibatch_0"] == 0
    # Random weights may give a batch without a single right answer: nothing can move then, and the warning says so.
    assert all(row["log_s_abs_max/minibatch_3"] > 1e-6 for row in trained if row["grad_norm"] > 0)
    assert trained or "constant-reward" in finished[1]


def test_an_awaited_reward_of_one_s_own_scores_with_its_parts(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0])[1:]
    assert [row["unscored"] for row in rows] == [0, 0, 0]
    scored = [row for row in rows if row["truncated"] < 1]
    for row in scored:
        assert row["reward/right"] >= row["reward_mean"], "a truncated response is wrong unseen"
        assert 1 <= row["reward/_tokens"] <= row["answer_length"]
    assert scored


def test_every_update_arrived(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0])[1:]
    assert [row["weight_version"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["canary_mean"] < 1e-5
        assert row["canary_largest"] < 1e-4


@pytest.mark.parametrize("victim", [SERVER, CONTROLLER, TRAINER])
def test_a_killed_process_ends_the_job(tmp_path: Path, victim: str) -> None:
    job = start(tmp_path)
    try:
        wait_for(job, victim, lambda: processes_with(tmp_path, victim))
        os.kill(processes_with(tmp_path, victim)[0], signal.SIGKILL)
        said = finish(job)
    finally:
        job.terminate()
    assert job.returncode == 1
    assert "failed: killed by SIGKILL" in said.strip().splitlines()[-1]
    assert_all_ended(tmp_path)


def test_ctrl_c_ends_the_job(tmp_path: Path) -> None:
    job = start(tmp_path)
    wait_for(job, "processes of every role", lambda: len(processes_of(tmp_path)) >= 5)
    job.send_signal(signal.SIGINT)
    said = finish(job)
    assert job.returncode == 130
    ended, to_go_on = said.strip().splitlines()[-2:]
    assert ended == "gspo: ended by SIGINT" and "to go on: " in to_go_on
    assert_all_ended(tmp_path)
