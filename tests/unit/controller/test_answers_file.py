"""`gspo eval` in the controller: servers that have loaded weights themselves, and a file of every response."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_megatron.controller.servers import Refused
from gspo_megatron.evaluation.answers import read_answers
from gspo_megatron.inference.weight_guard import LOADED_VARIABLE, WeightGuard
from gspo_megatron.transport.messages import EvaluationRequest
from gspo_megatron.types import Problem
from tests.unit.controller.controllers import controlling, set_scorer
from tests.unit.controller.fakes import FakeServer

GREEDY = EvaluationRequest(problems=3, answers=2, temperature=0.0, keep=True)


async def test_every_response_is_a_line(tmp_path: Path) -> None:
    def score(problem: Problem, text: str, reason: str) -> float:
        if problem.id == "-3":
            raise KeyError("tests")
        return 1.0 if problem.id == "-1" else 0.25

    async with controlling(tmp_path / "samples", FakeServer()) as controller:
        set_scorer(controller, score)
        report = await controller.evaluate(GREEDY)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted((line["prompt"], line["sample"]) for line in lines) == [(-p, s) for p in (3, 2, 1) for s in (0, 1)]
    assert {line["unscored"] for line in lines if line["prompt"] == -3} == {"raised"}
    assert all(line["tokens"] == 3 and line["stop_reason"] == "length" for line in lines)
    answers = read_answers(tmp_path / "answers.jsonl")
    assert answers.right.tolist() == [[True, True], [False, False], [False, False]]
    assert answers.rewards.tolist() == [[1.0, 1.0], [0.25, 0.25], [0.0, 0.0]]
    assert answers.right.mean() == report.accuracy and answers.rewards.mean() == report.mean_reward
    assert (answers.mean_tokens, answers.stop_reasons, answers.unscored) == (3.0, {"length": 6}, {"raised": 2})


async def test_without_keep_nothing_is_written(tmp_path: Path) -> None:
    async with controlling(tmp_path / "samples", FakeServer()) as controller:
        await controller.evaluate(GREEDY.model_copy(update={"keep": False}))
    assert not (tmp_path / "answers.jsonl").exists()


def test_answers_of_a_cut_evaluation_are_no_result(tmp_path: Path) -> None:
    line = {"prompt": -1, "sample": 0, "reward": 1.0, "right": True, "tokens": 1, "stop_reason": "stop", "unscored": ""}
    lines = [line, line | {"sample": 1}, line | {"prompt": -2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(ValueError, match="holds 3 responses to 2 problems, not as many to each"):
        read_answers(tmp_path / "a.jsonl")


async def test_loaded_weights_are_labelled_and_serve_as_version_0(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.version = "default"
    async with controlling(tmp_path, fake, version=None, loaded=True) as controller:
        await controller.start()
        assert controller.updater.version == 0 and "/update_weight_version" in fake.calls
        assert (await controller.evaluate(GREEDY)).problems == 3


async def test_a_server_that_cannot_be_labelled_is_no_server(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.fail["/update_weight_version"] = 500
    async with controlling(tmp_path, fake, version=None, loaded=True) as controller:
        with pytest.raises(Refused, match="/update_weight_version with 500"):
            await controller.start()


@pytest.mark.parametrize("loaded", [True, False])
async def test_the_guard_lets_a_server_sample_that_has_loaded_files(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    async def app(scope: object, receive: object, send: object) -> None:
        reached.append("engine")

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            reached.append(str(message["status"]))

    async def receive() -> dict[str, object]:
        return {}

    if loaded:
        monkeypatch.setenv(LOADED_VARIABLE, "1")
    await WeightGuard(app)({"type": "http", "path": "/gspo/generate"}, receive, send)
    assert reached == (["engine"] if loaded else ["409"])
