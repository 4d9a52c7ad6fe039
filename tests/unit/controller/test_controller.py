"""The controller with servers that fail: nothing lost, nothing doubled, one sentence."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.api import Service
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.scoring import Scorer, ScoringPool
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import parse_recipe
from gspo_megatron.transport.controller_client import ControllerClient, ControllerError
from gspo_megatron.types import Problem
from tests.unit.controller.fakes import KEY, FakeServer, Prompts, Tokenizer, serving

ARCHITECTURE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 64,
}
RECIPE = parse_recipe(
    {
        "model": {"architecture": ARCHITECTURE},
        "data": {"path": "unused"},
        "batch": {"prompts": 8, "answers": 3},
        "rollout": {"max_prompt_tokens": 20, "max_answer_tokens": 4, "start_timeout": 2},
    }
)


class InThread(ScoringPool):
    """Scores without processes, which `test_rollout_scoring.py` tests."""

    def __init__(self, score: Scorer) -> None:
        super().__init__(lambda: score, 1, 1.0)
        self._scorer = score

    def start(self) -> None:
        pass

    def _run(self, problem: Problem, text: str, reason: str) -> float | str:
        return self._scorer(problem, text, reason)  # type: ignore[arg-type]


def score_first_problem_half(problem: Problem, text: str, reason: str) -> float:
    return 0.5 if problem.id == "0" else 1.0


@asynccontextmanager
async def controlling(
    directory: Path,
    *servers: FakeServer,
    version: int | None = 0,
    recipe: Recipe = RECIPE,
    overlaps: bool = False,
    sleeps: bool = False,
) -> AsyncIterator[Controller]:
    async with serving(*servers) as clients:
        scoring = InThread(score_first_problem_half)
        store = SampleStore(directory)
        server_set = ServerSet(clients)
        controller = Controller(
            recipe, server_set, Prompts(), Tokenizer(), scoring, store, "127.0.0.1", overlaps, sleeps
        )
        controller.updater.version = version
        yield controller
        await controller.close()


def test_a_server_lost_in_the_batch_loses_no_answer_and_doubles_none(tmp_path: Path) -> None:
    async def run() -> None:
        good, bad = FakeServer(), FakeServer()
        async with controlling(tmp_path, good, bad) as controller:
            bad.fail["/inference/v1/generate"] = 500
            batch = await controller.rollout(1)
            places = [(row["prompt_index"], row["sample_index"]) for row in batch["samples"]]
            assert places == [(p, s) for p in range(8) for s in range(3)]
            assert len(list(tmp_path.glob("*.sample"))) == 24 == len(batch["samples"])
            assert controller.status()["servers"][good.url] == ""
            assert "500" in controller.status()["servers"][bad.url]
            bad.fail.clear()
            asked = len(bad.calls)
            await controller.rollout(2)
            assert len(bad.calls) == asked, "a server that was taken out serves no more"

    asyncio.run(run())


def test_the_last_lost_server_ends_the_batch_with_its_reason(tmp_path: Path) -> None:
    async def run() -> None:
        fake = FakeServer()
        fake.fail["/inference/v1/generate"] = 500
        async with controlling(tmp_path, fake) as controller:
            for _ in range(2):
                with pytest.raises(Refused, match=r"no server is left: .* with 500"):
                    await controller.rollout(1)

    asyncio.run(run())


def test_answers_of_another_version_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        fake = FakeServer()
        fake.version = "6"
        async with controlling(tmp_path, fake, version=7) as controller:
            with pytest.raises(Refused, match=r"with weights of version \[6\], where version 7 and"):
                await controller.rollout(1)

    asyncio.run(run())


def test_nothing_is_sampled_before_the_first_weights(tmp_path: Path) -> None:
    async def run() -> None:
        fake = FakeServer()
        async with controlling(tmp_path, fake, version=None) as controller:
            with pytest.raises(Refused, match="no server has weights yet"):
                await controller.evaluate(3, 1, 0.0)
        assert fake.calls == []

    asyncio.run(run())


def test_evaluation_counts_full_scores(tmp_path: Path) -> None:
    async def run() -> None:
        async with controlling(tmp_path, FakeServer()) as controller:
            found = await controller.evaluate(4, 2, 0.0)
            assert (found["accuracy"], found["mean_reward"], found["mean_length"]) == (1.0, 1.0, 3.0)
            batch = await controller.rollout(0)
            assert [row["reward"] for row in batch["samples"]] == [0.5] * 3 + [1.0] * 21

    asyncio.run(run())


def test_a_server_that_never_answers_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        fake = FakeServer()
        fake.fail["/health"] = 503
        async with controlling(tmp_path, fake) as controller:
            with pytest.raises(Refused, match=f"server {fake.url} did not answer its health check within"):
                await controller.start()
            assert controller.phase.startswith("failed: server")

    asyncio.run(run())


def test_one_operation_at_a_time_and_sentences_over_http(tmp_path: Path) -> None:
    async def run() -> None:
        fake = FakeServer()
        async with controlling(tmp_path, fake) as controller:
            runner = web.AppRunner(Service(controller, KEY).application())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = "http://{}:{}".format(*runner.addresses[0][:2])
            failure: list[str] = []

            def drive() -> None:
                controller = ControllerClient(url, KEY)
                controller.wait_ready(10)
                batch = controller.rollout(0)
                assert batch["samples"][0].segments[0].version == 0 and controller.state()["stream"] == {"index": 8}
                controller.restore({**controller.state(), "stream": {"index": 3}})
                assert controller.state()["stream"] == {"index": 3}
                fake.hang = True
                waiting = threading.Thread(target=controller.rollout, args=(1,))
                waiting.start()
                while controller.status()["progress"]["done"] != 0:
                    time.sleep(0.01)
                for call in (
                    lambda: controller.rollout(2),
                    lambda: controller.evaluate(1),
                    lambda: controller.finish_update(9, [], []),
                ):
                    with pytest.raises(ControllerError) as caught:
                        call()
                    failure.append(str(caught.value))
                fake.hang = False
                waiting.join()
                controller.close()

            try:
                await asyncio.to_thread(drive)
            finally:
                await runner.cleanup()
        assert failure == ["the controller is busy with /rollout"] * 3

    asyncio.run(run())


def test_a_controller_that_is_gone_is_a_sentence() -> None:
    controller = ControllerClient("http://127.0.0.1:9", KEY)
    with pytest.raises(ControllerError, match=r"the controller at http://127.0.0.1:9 is gone: ConnectError on /status"):
        controller.status()
    with pytest.raises(ControllerError, match=r"after 0.1 s the rollout is not ready: the controller at"):
        controller.wait_ready(0.1)
    controller.close()


def test_a_wrong_key_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with controlling(tmp_path, FakeServer()) as controller:
            runner = web.AppRunner(Service(controller, KEY).application())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = "http://{}:{}".format(*runner.addresses[0][:2])
            async with aiohttp.ClientSession() as session:
                for path in ("/status", "/state", "/nothing"):
                    assert (await session.get(url + path)).status == 401
                assert (await session.get(url + "/health")).status == 200
            await runner.cleanup()

    asyncio.run(run())
