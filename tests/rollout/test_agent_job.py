"""A job whose responses an unmodified OpenAI client makes, every process real: only what was sampled is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout.jobs import assert_all_ended, finish, rows_of, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("agent_job")
    # Long enough to learn how a call is written, so that some episodes have two turns.
    more = ("cold_start.steps=150", "cold_start.batch_size=64", "model.architecture.initializer_range=0.02",
            "trainer.max_steps=2")  # fmt: skip
    job = start(directory, *more, recipe="recipes/tiny_agent.yaml")
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    return directory


def test_trainer_and_sampler_agree_on_every_turn(finished: Path) -> None:
    for row in rows_of(finished)[1:]:
        assert row["mismatch_abs_max"] < 1e-4
        assert row["log_s_abs_max/minibatch_0"] <= 1e-6
        assert row["canary_largest"] < 1e-4


def test_nothing_is_tokenized_twice_and_every_episode_counts(finished: Path) -> None:
    rows = rows_of(finished)[1:]
    for row in rows:
        assert row["tokens_retokenized"] == 0 and row["agent_branches"] == 0
        assert row["agent_turns"] >= 1 and row["unscored"] == 0
    assert any(row["agent_turns"] > 1 and row["masked_tokens"] > 0 for row in rows)
    assert rows[-1]["sampled_tokens"] == sum(row["rollout_tokens"] for row in rows)
    assert_all_ended(finished)
