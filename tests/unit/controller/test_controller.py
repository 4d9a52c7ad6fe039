"""The controller with servers that fail: nothing lost, nothing doubled, one sentence."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gspo_megatron.controller.api import Service
from gspo_megatron.controller.servers import Refused
from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.transport.auth import key_header
from gspo_megatron.transport.controller_client import ControllerClient, ControllerError
from gspo_megatron.transport.messages import (
    ControllerState,
    Empty,
    ErrorReply,
    EvaluationRequest,
    GenerationState,
    GroupState,
    RolloutRequest,
)
from gspo_megatron.transport.update_messages import UpdateCheck
from gspo_megatron.types import Problem, Prompt, SampleRef
from tests.unit.controller.controllers import (
    controlling,
)
from tests.unit.controller.fakes import KEY, FakeServer
from tests.waiting import HANG


async def test_a_server_lost_in_the_batch_loses_no_answer_and_doubles_none(tmp_path: Path) -> None:
    good, bad = FakeServer(), FakeServer()
    async with controlling(tmp_path, good, bad) as controller:
        bad.fail["/gspo/generate"] = 500
        batch = await controller.rollout(RolloutRequest(step=1))
        places = [(row.prompt_index, row.sample_index) for row in batch.samples]
        assert places == [(p, s) for p in range(8) for s in range(3)]
        assert [sample.ref for sample in read_samples(tmp_path)] == list(batch.samples) and len(batch.samples) == 24
        assert (await controller.status(Empty())).servers[good.url] == ""
        assert "500" in (await controller.status(Empty())).servers[bad.url]
        bad.fail.clear()
        asked = len(bad.calls)
        await controller.rollout(RolloutRequest(step=2))
        assert len(bad.calls) == asked, "a server that was taken out serves no more"


async def test_the_last_lost_server_ends_the_batch_with_its_reason(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.fail["/gspo/generate"] = 500
    async with controlling(tmp_path, fake) as controller:
        for _ in range(2):
            with pytest.raises(Refused, match=r"no server is left: .* with 500"):
                await controller.rollout(RolloutRequest(step=1))


async def test_answers_of_another_version_are_refused(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.version = "6"
    async with controlling(tmp_path, fake, version=7) as controller:
        with pytest.raises(Refused, match=r"with weights of version \[6\], where version 7 and"):
            await controller.rollout(RolloutRequest(step=1))


async def test_nothing_is_sampled_before_the_first_weights(tmp_path: Path) -> None:
    fake = FakeServer()
    async with controlling(tmp_path, fake, version=None) as controller:
        with pytest.raises(Refused, match="no server has weights yet"):
            await controller.evaluate(EvaluationRequest(problems=3, answers=1, temperature=0.0))
    assert fake.calls == []


async def test_evaluation_counts_full_scores(tmp_path: Path) -> None:
    async with controlling(tmp_path, FakeServer()) as controller:
        found = await controller.evaluate(EvaluationRequest(problems=4, answers=2, temperature=0.0))
        assert (found.accuracy, found.mean_reward, found.mean_length) == (1.0, 1.0, 3.0)
        assert (found.problems, found.answers, found.temperature) == (4, 2, 0.0)
        assert len({example.question for example in found.examples}) == 3, "a response to each of three problems"
        batch = await controller.rollout(RolloutRequest(step=0))
        assert [row.reward for row in batch.samples] == [0.5] * 3 + [1.0] * 21


async def test_a_server_that_never_answers_is_named(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.fail["/health"] = 503
    async with controlling(tmp_path, fake) as controller:
        with pytest.raises(Refused, match=f"server {fake.url} did not answer its health check within"):
            await controller.start()
        assert controller.phase.startswith("failed: server")


async def test_one_operation_at_a_time_and_sentences_over_http(tmp_path: Path) -> None:
    fake = FakeServer()
    async with controlling(tmp_path, fake) as controller:
        runner = web.AppRunner(Service(controller, KEY).application())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://{}:{}".format(*runner.addresses[0][:2])
        failure: list[str] = []

        def drive() -> None:
            controller = ControllerClient(url, KEY)
            controller.wait_ready(HANG)
            batch = controller.rollout(RolloutRequest(step=0))
            assert batch.samples[0].segments[0].version == 0 and controller.state().stream.index == 8
            state = controller.state()
            stream = state.stream.model_copy(update={"index": 3})
            controller.restore(state.model_copy(update={"stream": stream}))
            assert controller.state().stream.index == 3
            fake.hang = True
            waiting = threading.Thread(target=controller.rollout, args=(RolloutRequest(step=1),))
            waiting.start()
            while controller.status().progress.done != 0:
                time.sleep(0.01)
            for call in (
                lambda: controller.rollout(RolloutRequest(step=2)),
                lambda: controller.evaluate(EvaluationRequest(problems=1, answers=1, temperature=0.0)),
                lambda: controller.finish_update(UpdateCheck(version=9, checksums=(), probes=())),
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


def test_a_controller_that_is_gone_is_a_sentence() -> None:
    controller = ControllerClient("http://127.0.0.1:9", KEY)
    with pytest.raises(ControllerError, match=r"the controller at http://127.0.0.1:9 is gone: ConnectError on /status"):
        controller.status()
    with pytest.raises(ControllerError, match=r"after 0.1 s the rollout is not ready: the controller at"):
        controller.wait_ready(0.1)
    controller.close()


async def test_a_wrong_key_is_refused(tmp_path: Path) -> None:
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


async def test_whatever_is_sent_to_the_service_gets_one_sentence(tmp_path: Path) -> None:
    async with controlling(tmp_path, FakeServer()) as controller:
        runner = web.AppRunner(Service(controller, KEY).application())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://{}:{}".format(*runner.addresses[0][:2])
        state = await controller.state(Empty())
        cases = [
            ("GET", "/nothing", b"", 404, "GET /nothing: Not Found; run trainer, controller and servers"),
            ("GET", "/rollout", b"", 405, "GET /rollout: Method Not Allowed; run trainer"),
            ("POST", "/rollout", b"", 400, "message RolloutRequest: "),
            ("POST", "/rollout", b'{"step": "1"}', 400, "message RolloutRequest: field step is wrong: "),
            ("POST", "/rollout", b'{"step": -1}', 400, "message RolloutRequest: field step is wrong: "),
            ("POST", "/rollout", b'{"step": NaN}', 400, "message RolloutRequest: "),
            ("POST", "/state", b'{"groups": []}', 400, "message ControllerState lacks its field stream; run trainer"),
            ("POST", "/weights/finish", b"[" * 9999, 400, "message UpdateCheck: "),
            ("POST", "/state", with_response(state, length=2).to_json().encode(), 409, "gone.sample"),
            (
                "POST",
                "/state",
                with_response(state, length=-2).to_json().encode(),
                500,
                "/state failed in the controller: ValueError",
            ),
        ]
        async with aiohttp.ClientSession(headers=key_header(KEY)) as session:
            for method, path, body, status, words in cases:
                response = await session.request(method, url + path, data=body)
                sentence = ErrorReply.from_json(await response.read()).error
                assert response.status == status and words in sentence and "\n" not in sentence, (path, body, sentence)
            headers = {"Content-Encoding": "deflate"}
            undecodable = await session.post(url + "/rollout", data=b"not deflate", headers=headers)
            assert undecodable.status == 400 and ErrorReply.from_json(await undecodable.read()).error
        await runner.cleanup()


def with_response(state: ControllerState, length: int) -> ControllerState:
    """The state with a group of one unfinished and one finished member, whose files are gone."""
    prompt = Prompt(9, Problem("a", "q", {}), (1,))
    ref = SampleRef("gone.sample", 9, 0, 1, length, 0.0, "stop", ())
    generation = GenerationState(sample_index=0, parts=1, lost=0, state=None)
    group = GroupState(
        prompt=prompt, answers=2, limit=None, finished=(replace(ref, sample_index=1),),
        first_versions={"0": 0, "1": 0}, generations=(generation,),
    )  # fmt: skip
    if length < 0:  # only a finished member, of which the length alone is read
        group = group.model_copy(
            update={"answers": 1, "finished": (ref,), "first_versions": {"0": 0}, "generations": ()}
        )
    return state.model_copy(update={"groups": (group,), "generations": (ref,) * len(group.generations)})
