"""The main job with every policy for long answers and a calculator in it: what is trained on is what was sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout.jobs import assert_all_ended, finish, rows_of, start

TALKING = (
    "environment={name: calculator, call_start: '', call_end: '=', reply: ' {result} ', max_turns: 3}",
    "rollout.thinking={budget: 9, end: '<|work|>', closing: '<|work|>'}",
    "rollout.repetition_halt={longest_pattern: 1, times: 2}",
    "rollout.length_stages=[{until_step: 1, max_answer_tokens: 20}]",
    "objective.overlong=soft", "objective.overlong_buffer=8", "trainer.max_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("turns_job")
    job = start(directory, *TALKING)
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    return directory


def test_every_policy_took_part_and_is_counted(finished: Path) -> None:
    rows = rows_of(finished)[1:]
    assert [row["answer_limit"] for row in rows] == [20, 28]
    for name in ("tool_calls", "thinking_closed", "masked_tokens", "halted"):
        assert any(row[name] > 0 for row in rows), name
    lengths = [row["answer_length"] * 32 * (1 - row["masked_tokens"]) for row in rows]
    assert [row["rollout_tokens"] for row in rows] == pytest.approx(lengths)
    assert rows[-1]["sampled_tokens"] == sum(row["rollout_tokens"] for row in rows)
    assert_all_ended(finished)


def test_trainer_and_sampler_agree_on_every_trained_token(finished: Path) -> None:
    for row in rows_of(finished)[1:]:
        assert row["mismatch_abs_max"] < 1e-4
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
        assert row["canary_largest"] < 1e-4
