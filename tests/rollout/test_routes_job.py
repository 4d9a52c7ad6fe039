"""A job that replays the sampler's routes, with responses that outlive an update and every process real."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.data.sample_index import INDEX, read_refs
from gspo_megatron.data.store import SampleStore
from tests.rollout.jobs import finish, rows_of, start

REWARD = "reward.name=tests/rollout/own_reward.py:first_token"
SETTINGS = (REWARD, "objective.replay=sampler", "trainer.skip_zero_gradients=false", "rollout.max_staleness=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("routes_job")
    job = start(directory, *SETTINGS, "rollout.max_concurrency=16")
    said = finish(job)
    assert job.returncode == 0, said[-3000:]
    return directory


def test_weights_that_have_not_moved_choose_what_the_sampler_chose(finished: Path) -> None:
    first = rows_of(finished)[1]
    assert first["experts/sampler_disagreement"] < 1e-3
    assert first["mismatch_abs_max"] < 1e-4 and first["mismatch_sampled/replay_largest"] < 1e-4
    assert first["experts/route_seconds"] > 0


def test_tokens_of_older_weights_keep_the_experts_of_those(finished: Path) -> None:
    later = [row for row in rows_of(finished)[2:] if row["staleness_mean"] > 0 and row["grad_norm"] > 0]
    assert later and max(row["experts/sampler_disagreement"] for row in later) > 0
    for row in later:
        by_length = [value for key, value in row.items() if key.startswith("experts/sampler_disagreement/le_")]
        assert min(by_length) <= row["experts/sampler_disagreement"] <= max(by_length)


def test_every_route_of_the_store_is_replayed(finished: Path) -> None:
    store = SampleStore(finished / "run" / "samples")
    indexes = INDEX.find(store.directory)
    for row in rows_of(finished)[1:]:
        rows = [store.read_routes(ref) for ref in read_refs(indexes[row["step"]])]
        lengths = [ref.prompt_length + ref.answer_length - 1 for ref in read_refs(indexes[row["step"]])]
        assert [0 if one is None else len(one) for one in rows] == lengths
        assert sum(one.nbytes for one in rows if one is not None) == row["experts/sampler_route_bytes"]
