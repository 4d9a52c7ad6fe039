"""A checkpoint of a rank's policy gives back every bit that the next optimizer step depends on."""

from __future__ import annotations

import json

import pytest

from tests.parallel.world import run_world

CASES = {
    "DP2": [],
    "TP2_EP2": ["trainer.tensor_parallel=2", "trainer.expert_parallel=2"],
    "PP2": ["trainer.pipeline_parallel=2"],
    "DP2_bf16": ["model.dtype=bfloat16"],
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, bool]]]:
    directory = tmp_path_factory.mktemp("checkpoint")
    run_world("checkpoint_worker.py", 2, CASES, directory)
    return [json.loads((directory / f"verdict-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_with_the_same_bits(case: str, verdicts: list[dict[str, dict[str, bool]]]) -> None:
    for rank, verdict in enumerate(verdicts):
        assert verdict[case] == {"restored": True, "same": True, "moments_matter": True}, f"rank {rank}"
