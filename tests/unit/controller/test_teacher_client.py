"""The teacher against a server on loopback: what it is asked, what its failures become, what its start checks."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from gspo_megatron import model_requests
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.objective_spec import ObjectiveSection
from gspo_megatron.config.teacher_section import TeacherSection
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.servers import Refused
from gspo_megatron.controller.teacher_client import Teacher
from gspo_megatron.data.samples import select
from gspo_megatron.models import load_recipe
from gspo_megatron.transport.auth import KEY_VARIABLE
from gspo_megatron.transport.messages import ControllerState, Empty, EvaluationRequest, RolloutRequest
from tests.places import ROOT
from tests.unit.controller.controllers import RECIPE, controlling
from tests.unit.controller.fakes import FakeServer, make_prompt

KEY = "sk-teacher-0123456789"
ROWS, LONGEST = RECIPE.arch.vocab_size, RECIPE.rollout.max_sequence_tokens
Reply = Callable[[dict[str, Any]], web.Response]


class Vocabulary:
    vocab_size = ROWS

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join("" if one == 0 else "\u2047" if one == 2 else f"t{one}" for one in ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return ["</s>" if one == 0 else "<unk>" if one == 2 else f" t{one}" for one in ids]


def prompt_logprobs(
    ids: Sequence[int], text: Callable[[int], str | None] = lambda one: "<unk>" if one == 2 else f" t{one}"
) -> list[Any]:
    """As vLLM writes them: the k-th token has log-prob -k / 8."""
    return [None] + [
        {str(one): {"logprob": -at / 8, "rank": 1, "decoded_token": text(one)}} for at, one in enumerate(ids) if at
    ]


def scored(body: dict[str, Any], **changes: Any) -> web.Response:
    rows = prompt_logprobs(body["prompt"], **changes)
    return web.json_response({"choices": [{"index": 0, "text": "x", "prompt_logprobs": rows}]})


@dataclass
class Server:
    """Serves one model; a prompt gets the reply of `replies` that its turn has, or its log-probs."""

    models: Any = field(default_factory=lambda: {"data": [{"id": "big", "max_model_len": LONGEST + 1}]})
    replies: list[Reply] = field(default_factory=list)
    always: Reply = scored
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    now: int = 0
    most: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    opens_at: int = 1
    """Requests at a time from which on they are answered."""

    async def serve(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        if request.path == "/v1/models":
            assert request.method == "GET"
            return web.json_response(self.models)
        assert (request.method, request.path) == ("POST", "/v1/completions")
        body = await request.json()
        assert len(body["prompt"]) <= LONGEST, "no longer than what the run samples"
        self.asked.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.opens_at:
            self.gate.set()
        try:
            await self.gate.wait()
            return (self.replies.pop(0) if self.replies else self.always)(body)
        finally:
            self.now -= 1


@asynccontextmanager
async def teaching(server: Server, started: bool = True, **section: Any) -> AsyncIterator[Teacher]:
    """A teacher that has passed its checks; what it was asked meanwhile is forgotten."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.serve)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    made = Teacher(recipe(url=url, **section), Vocabulary())
    try:
        if started:
            await made.start()
            server.asked.clear()
        yield made
    finally:
        await made.close()
        await runner.cleanup()


def recipe(**section: Any) -> Any:
    taught = TeacherSection.model_validate({"url": "http://h/v1", "model": "big", **section})
    return RECIPE.model_copy(
        update={"teacher": taught, "objective": ObjectiveSection.model_validate({"preset": "distillation"})}
    )


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited between attempts."""
    made: list[float] = []

    async def note(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(model_requests, "_pause", note)
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    return made


def finished(prompt: Sequence[int], answer: Sequence[int], observed: Sequence[int] = ()) -> Generation:
    """A response; after its first token an environment may have replied."""
    made = Generation(make_prompt(4, prompt), 2)
    made.extend(answer[:1], [-1.0], 0)
    if observed:
        made.put_in(observed, "observation")
    made.extend(answer[1:], [-1.0] * (len(answer) - 1), 0)
    return made


async def test_a_request_holds_ids_and_what_comes_back_is_of_the_response() -> None:
    server = Server()
    async with teaching(server, key_variable="TEST_TEACHER_KEY") as teacher:
        generation = finished([7, 8, 9], [3, 4, 0], observed=[40, 41])
        response, fault = await teacher.add_logprobs(generation, generation.response("stop"))
    ids = [7, 8, 9, 3, 40, 41, 4, 0]
    body = {"model": "big", "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    assert (fault, server.asked, server.keys) == ("", [body], {f"Bearer {KEY}"})
    assert response.teacher_logprobs is not None and response.teacher_logprobs.dtype == np.float32
    assert response.teacher_logprobs.tolist() == [-3 / 8, 0, 0, -6 / 8, -7 / 8]


async def test_what_is_trained_on_goes_into_the_store_and_an_evaluation_asks_nothing(tmp_path: Path) -> None:
    server = Server()
    async with teaching(server) as teacher, controlling(tmp_path, FakeServer(), teacher=teacher) as controller:
        await controller.evaluate(EvaluationRequest(problems=3, answers=1, temperature=0.0))
        assert not server.asked
        batch = await controller.rollout(RolloutRequest(step=1))
        assert len(server.asked) == len(batch.samples) == 24
        for ref in batch.samples:
            ids, start, _ = controller._store.read(ref)
            found = controller._store.read_teacher(ref)
            assert found is not None and found.tolist() == [-at / 8 for at in range(start, len(ids))]
        assert not any(ref.teacher_fault for ref in batch.samples)


def broken(status: int, text: str = "no") -> Reply:
    return lambda body: web.Response(status=status, text=text)


def changed(rows: Callable[[list[Any]], object]) -> Reply:
    def reply(body: dict[str, Any]) -> web.Response:
        return web.json_response({"choices": [{"prompt_logprobs": rows(prompt_logprobs(body["prompt"]))}]})

    return reply


def last(logprob: object) -> Reply:
    return changed(lambda rows: [*rows[:-1], {one: {"logprob": logprob} for one in rows[-1]}])


FAULTS: dict[str, tuple[Reply, str]] = {
    "a refusal": (broken(400, f"Token id 77 is out of vocabulary {KEY}"), r"answered HTTP 400 Token id 77.*\*\*\*$"),
    "wrong key": (broken(401), "answered HTTP 401"),
    "no log-probs": (changed(lambda rows: None), "without log-probs of the prompt: TypeError"),
    "one too few": (changed(lambda rows: rows[:-1]), "without log-probs of the prompt: ValueError"),
    "another token": (changed(lambda rows: [*rows[:-1], {"99": {"logprob": -1.0}}]), "KeyError: '3'"),
    "no JSON": (lambda body: web.Response(text='{"choices": ['), "without log-probs of the prompt: JSONDecodeError"),
    "deep": (lambda body: web.Response(text="[" * 100_000), "without log-probs of the prompt: RecursionError"),
    "impossible": (last(-9999.0), r"token 2 of the response \(id 3\) has log-prob -9999"),
    "not a number": (last(float("nan")), "has log-prob nan"),
    "above 0": (last(0.5), "has log-prob 0.5"),
    "a text": (last("x"), "ValueError"),
    "a flood": (lambda body: web.Response(body=b" " * (2 << 20)), "a reply of more than 1 MiB"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_response_that_it_fails_is_counted_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    async with teaching(server, attempts=1) as teacher:
        server.always = FAULTS[name][0]
        generation = finished([7, 8], [3, 3, 3])
        before = generation.response("stop")
        assert await teacher.add_logprobs(generation, before) == (before, "failed")
    (said,) = [record.getMessage() for record in caplog.records if "gave no log-probs" in record.getMessage()]
    assert "teacher.model=big gave no log-probs to sample 2 of prompt 4" in said
    assert "it is not trained on, and the metric dropped/no-teacher counts the others" in said
    assert KEY not in said
    assert re.search(FAULTS[name][1].rstrip("$"), said), said


async def test_a_busy_server_is_asked_again(pauses: list[float]) -> None:
    server = Server()
    async with teaching(server) as teacher:
        server.replies = [broken(503), broken(429), lambda body: web.Response(status=500)]
        generation = finished([7], [3, 4])
        response, fault = await teacher.add_logprobs(generation, generation.response("stop"))
    assert (fault, len(server.asked), len(pauses)) == ("", 4, 3)
    assert response.teacher_logprobs is not None and response.teacher_logprobs.tolist() == [-1 / 8, -2 / 8]


async def test_a_server_that_hangs_or_is_gone_is_left(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    server, generation = Server(), finished([7], [3, 4])
    async with teaching(server, request_seconds=0.3, attempts=2) as teacher:
        server.gate.clear()
        server.opens_at = 9
        before = generation.response("stop")
        assert await teacher.add_logprobs(generation, before) == (before, "failed")
        assert "gave no answer in 2 attempts; the last: no reply within 0.3 s" in caplog.text and len(pauses) == 1


async def test_some_that_fail_are_left_out_of_training_and_survive_a_checkpoint(tmp_path: Path) -> None:
    server = Server()
    async with teaching(server, attempts=1) as teacher, controlling(tmp_path, FakeServer(), teacher=teacher) as one:
        server.always = lambda body: broken(500)(body) if len(body["prompt"]) == 4 else scored(body)
        batch = await one.rollout(RolloutRequest(step=1))
        failed = [ref for ref in batch.samples if ref.teacher_fault]
        # Prompts 0 and 5 have one token, and every response three.
        assert {ref.prompt_index for ref in failed} == {0, 5} and len(failed) == 6
        assert all(ref.teacher_fault == "failed" and one._store.read_teacher(ref) is None for ref in failed)
        kept = select(batch.samples)
        assert kept.dropped == {"no-teacher": 6} and len(kept.refs) == 18
        stored = type(batch).from_json(batch.to_json())
        assert [ref.teacher_fault for ref in stored.samples] == [ref.teacher_fault for ref in batch.samples]
        assert ControllerState.from_json((await one.state(Empty())).to_json())


async def test_a_whole_batch_that_fails_ends_the_run(tmp_path: Path) -> None:
    server = Server()
    async with teaching(server, attempts=1) as teacher, controlling(tmp_path, FakeServer(), teacher=teacher) as one:
        server.always = broken(500, "CUDA out of memory")
        with pytest.raises(
            Refused, match=r"teacher\.model=big gave no log-probs to 24 responses in a row, a whole batch"
        ):
            await one.rollout(RolloutRequest(step=1))


async def test_no_more_requests_at_a_time_than_the_recipe_allows() -> None:
    server = Server()
    async with teaching(server, at_once=3) as teacher:
        server.gate.clear()
        server.opens_at, server.most = 3, 0
        made = [finished([7], [3, at]) for at in range(4, 20)]
        found = await asyncio.gather(*(teacher.add_logprobs(one, one.response("stop")) for one in made))
    assert server.most == 3 and [fault for _, fault in found] == [""] * 16


async def test_a_response_without_a_sampled_token_is_not_asked_about() -> None:
    server = Server()
    async with teaching(server) as teacher:
        generation = Generation(make_prompt(4, [7]), 0)
        before = generation.response("length")
        assert await teacher.add_logprobs(generation, before) == (before, "")
    assert not server.asked


STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (
        {"models": {"data": [{"id": "small"}, {"id": "other"}]}}, "serves small, other; name one of these"
    ),
    "no room": (
        {"models": {"data": [{"id": "big", "max_model_len": LONGEST}]}},
        rf"takes {LONGEST} tokens, and .* are {LONGEST + 1}; start it with --max-model-len {LONGEST + 1}",
    ),
    "no list": ({"models": []}, "teacher.url: TypeError"),
    "a smaller vocabulary": (
        {"always": broken(400, "Token id 49 is out of vocabulary")}, "answered HTTP 400 Token id 49 is out of"
    ),
    "another vocabulary": (
        {"always": lambda body: scored(body, text=lambda one: "" if one == 2 else f"t{one + (one > 30)}")},
        "id 31 is 't32' there and 't31' in the student's vocabulary",
    ),
    "no tokenizer": ({"always": lambda body: scored(body, text=lambda one: None)}, "it gives no text of tokens"),
    "garbled": ({"always": changed(lambda rows: None)}, "without log-probs of the prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
async def test_what_does_not_fit_is_refused_at_the_start(name: str) -> None:
    given, sentence = STARTS[name]
    async with teaching(Server(**given), started=False) as teacher:
        with pytest.raises(Refused, match=sentence):
            await teacher.start()


async def test_a_server_that_does_not_say_its_length_and_parts_of_characters_are_fine() -> None:
    async with teaching(Server({"data": [{"id": "big"}]}, always=lambda body: scored(
        body, text=lambda one: {2: "<unk>", 31: "\ufffd"}.get(one, f"t{one}")
    ))):  # fmt: skip
        pass


async def test_no_server_ends_the_controller_with_a_sentence(tmp_path: Path) -> None:
    # The discard port: nothing listens there.
    teacher = Teacher(recipe(url="http://127.0.0.1:9/v1", attempts=2), Vocabulary())
    async with controlling(tmp_path, FakeServer(), teacher=teacher) as controller:
        with pytest.raises(
            Refused, match=r"teacher\.url: .* in 2 attempts; the last: ClientConnectorError.*vllm serve"
        ):
            await controller.open_teacher()


def test_a_key_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY")
    with pytest.raises(RecipeError, match=r"teacher-key-missing.*TEST_TEACHER_KEY is not set"):
        Teacher(recipe(key_variable="TEST_TEACHER_KEY"), Vocabulary())


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"url": "teacher:8000"}, "url is no address"),
        ({"url": "http://h/v1/completions"}, "ends in /completions, which is added to it"),
        ({"key_variable": "TEACHER"}, "holds KEY, TOKEN, SECRET"),
        ({"at_once": 0}, "greater than or equal to 1"),
        ({"options": {}}, "Extra inputs"),
    ],
)
def test_a_wrong_section_is_refused(section: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        recipe(**section)


def test_the_controller_s_process_ends_with_the_sentence_before_it_waits_for_anything(tmp_path: Path) -> None:
    changes = ["objective.preset=distillation", "objective.clip_low=null", "objective.clip_high=null"]
    taught = 'teacher={"url": "http://127.0.0.1:9/v1", "model": "big", "attempts": 1}'
    made = load_recipe(ROOT / "recipes" / "tiny_moe.yaml", [*changes, taught, f"run.directory={tmp_path / 'run'}"])
    run = prepare_run(made)
    command = [sys.executable, "-m", "gspo_megatron.controller.main", "--run-dir", str(run), "--host", "127.0.0.1"]
    ended = subprocess.run(
        [*command, "--port", "0", "--servers", "http://127.0.0.1:9"], capture_output=True, text=True,
        env={**os.environ, KEY_VARIABLE: "a-key-of-this-test"},
    )  # fmt: skip
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("controller: teacher.url: http://127.0.0.1:9/v1 gave no answer in 1 attempts"), ended.stderr
