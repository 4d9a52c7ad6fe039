"""`make long-context` in short: a few thousand tokens, two context-parallel ranks, both rotary embeddings at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tools.long_context import ROPES, faults, run

TOKENS = 2000
# A sum of one digit: a text as short as this need not hold two certain ones side by side.
SHORT = (f"rollout.max_answer_tokens={TOKENS}", "trainer.ranks=2", "trainer.context_parallel=2", "run.seed=2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor() as pool:
        jobs = {rope: pool.submit(run, rope, SHORT, tmp_path_factory.mktemp(rope)) for rope in ROPES}
        return {rope: job.result() for rope, job in jobs.items()}


@pytest.mark.parametrize("rope", ROPES)
def test_sampler_and_trainer_agree(rows: dict[str, dict[str, Any]], rope: str) -> None:
    assert faults(rows[rope], TOKENS) == []


def test_memory_of_every_process_is_in_the_result(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        assert len(row["peak_mib"]["trainer"]) == 2 and len(row["peak_mib"]["server"]) >= 2
        assert min(row["peak_mib"]["trainer"]) > 100
