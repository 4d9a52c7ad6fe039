"""Rewards that fail: each response is counted, the first of a kind is quoted, a whole batch alike ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.servers import Refused
from gspo_megatron.transport.messages import EvaluationRequest, RolloutRequest
from gspo_megatron.types import Problem
from tests.unit.controller.controllers import controlling, set_scorer
from tests.unit.controller.fakes import FakeServer


def fail_sometimes(problem: Problem, text: str, reason: str) -> float:
    if problem.id in ("1", "-1"):
        raise KeyError("tests")
    if problem.id == "2":
        raise ZeroDivisionError(f"of {text}")
    return 1.0


def stopping() -> FakeServer:
    """Its responses are not truncated."""
    fake = FakeServer()
    fake.reason = "stop"
    return fake


async def test_each_is_counted_and_the_first_of_a_kind_is_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with controlling(tmp_path, stopping()) as controller:
        set_scorer(controller, fail_sometimes)
        batch = await controller.rollout(RolloutRequest(step=1))
        report = await controller.evaluate(EvaluationRequest(problems=3, answers=1, temperature=0.0))
        again = await controller.rollout(RolloutRequest(step=2))
    assert batch.unscored == {"raised": 6} and again.unscored == {}
    metrics = batch.metrics()
    assert (metrics["unscored"], metrics["unscored/raised"], again.metrics()["unscored"]) == (6, 6, 0)
    assert [row.reward for row in batch.samples if row.unscored] == [0.0] * 6
    assert report.unscored == 1
    quoted = [record.getMessage() for record in caplog.records if "gave no score" in record.getMessage()]
    assert len(quoted) == 2, "one of each kind"
    assert "KeyError: 'tests'" in quoted[0] and "in fail_sometimes" in quoted[0] and "sample" in quoted[0]


@pytest.mark.parametrize("what", ["rollout", "evaluate"])
async def test_a_whole_batch_that_fails_alike_ends_the_run(tmp_path: Path, what: str) -> None:
    def fail(problem: Problem, text: str, reason: str) -> float:
        raise ValueError(f"could not convert {problem.id}")

    async def ask(controller: Controller) -> None:
        if what == "rollout":
            await controller.rollout(RolloutRequest(step=1))
        else:
            await controller.evaluate(EvaluationRequest(problems=24, answers=1, temperature=0.0))

    async with controlling(tmp_path, stopping()) as controller:
        set_scorer(controller, fail)
        with pytest.raises(Refused, match="gave no score to 24 responses in a row, a whole batch: ValueError: could"):
            await ask(controller)
