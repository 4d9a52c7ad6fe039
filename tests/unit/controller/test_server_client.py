"""The client of one vLLM server: what it sends, what it refuses to send, what it makes of answers and of silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from gspo_megatron.controller.generation import Generation, Sampling, response_seed
from gspo_megatron.controller.scheduler import Scheduler
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.vllm_format import Ending, FormatError, RefusedRequest, read_ending
from gspo_megatron.types import Segment, StopReason
from tests.unit.controller.fakes import CONTEXT, KEY, VOCAB, FakeServer, make_prompt, serving

SAMPLED = Sampling(temperature=0.8, max_tokens=4, stop_ids=(0, 9), seed=3)


def version() -> int | None:
    return 0


async def generate(client: ServerClient, prompt, sample: int = 0, sampling: Sampling = SAMPLED) -> StopReason:
    return await client.generate(Generation(prompt, sample), sampling, version)


async def test_a_request_says_everything_that_decides_the_answer() -> None:
    fake = FakeServer()
    async with serving(fake) as [client]:
        generation = Generation(make_prompt(5), 2)
        answer = generation.response(await client.generate(generation, SAMPLED, version))
    assert fake.bodies[0]["token_ids"] == [1, 2, 3]
    assert fake.bodies[0]["sampling_params"] == {
        "n": 1,
        "temperature": 0.8,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 4,
        "stop_token_ids": [0, 9],
        "ignore_eos": True,
        "detokenize": False,
        "seed": response_seed(3, 5, 2, 0),
        "logprobs": 0,
    }
    assert (answer.prompt_index, answer.sample_index, answer.stop_reason) == (5, 2, "length")
    assert answer.token_ids.tolist() == [3, 3, 3] and answer.logprobs.tolist() == [-0.5] * 3
    assert answer.segments == (Segment(0, 0, 3),)


def test_seeds_differ_between_runs_prompts_samples_and_segments() -> None:
    seeds = {response_seed(a, b, c, d) for a in (0, 1) for b in (-1, 0, 11) for c in (0, 1, 2) for d in (0, 1)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds), "vLLM's seeds are signed 64-bit numbers"
    assert response_seed(0, 1, 2, 0) == response_seed(0, 1, 2, 0)


def test_an_ending_becomes_typed_values() -> None:
    spans = [["3", 0, 224], ["4", 224, 1000]]
    text = json.dumps({"finish_reason": "stop", "weight_versions": spans}).encode()
    assert read_ending(text) == Ending("stop", (Segment(3, 0, 224), Segment(4, 224, 1000)))
    assert read_ending(b'{"finish_reason": "abort"}') == Ending("abort", ())
    for wrong in (b"{}", b"", b"[]", b'{"finish_reason": "stop", "weight_versions": [["default", 0, 1]]}'):
        with pytest.raises(FormatError):
            read_ending(wrong)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "stop_token_ids are out of vocabulary", "code": 400}, RefusedRequest),
        ({"message": "unprocessable", "code": 422}, RefusedRequest),
        ({"message": "try again", "code": 429}, FormatError),
        ({"message": "EngineDeadError", "code": 500}, FormatError),
        ("the engine is dead", FormatError),
        ({}, FormatError),
    ],
)
def test_an_error_in_place_of_an_ending_keeps_its_words(error: object, kind: type[ValueError]) -> None:
    with pytest.raises(ValueError) as caught:
        read_ending(json.dumps({"error": error}).encode())
    assert type(caught.value) is kind
    words = error.get("message", "None") if isinstance(error, dict) else error
    assert str(words) in str(caught.value)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_a_refused_request_is_no_dead_server(status: int) -> None:
    """Its sentence ends the rollout; the server serves on."""
    fake = FakeServer()
    async with serving(fake) as [client]:
        servers = ServerSet([client], None)
        scheduler = Scheduler(servers, version)
        fake.fail["/gspo/generate"] = status
        with pytest.raises(Refused, match=f"prompt 7: server .* with {status}: .*was made to fail"):
            await scheduler.complete(Generation(make_prompt(7), 0), SAMPLED)
        with pytest.raises(RefusedRequest, match=f"with {status}"):
            await client.score((1, 2))
        assert servers.live == [client]
        fake.fail.clear()
        assert await scheduler.complete(Generation(make_prompt(7), 0), SAMPLED) == "length"


async def test_a_stop_id_without_a_row_is_not_sent() -> None:
    fake = FakeServer()
    async with serving(fake) as [client]:
        for wrong in (-1, VOCAB, 999_999):
            with pytest.raises(ValueError, match=f"stop id {wrong} lies outside"):
                await generate(client, make_prompt(0), sampling=Sampling(1.0, 4, (0, wrong), 0))
    assert fake.calls == []


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "sentence"),
    [
        ((), 4, "empty prompt"),
        ((1, VOCAB), 4, "token id 50 lies outside the model's vocabulary of 50"),
        ((-1, 2), 4, "token id -1 lies outside"),
        ((1,) * 20, 5, "a prompt of 20 tokens and an answer of up to 5 exceed the server's context of 24"),
    ],
)
async def test_what_would_kill_the_server_is_not_sent(token_ids, max_tokens: int, sentence: str) -> None:
    fake = FakeServer()
    async with serving(fake) as [client]:
        with pytest.raises(ValueError, match=sentence):
            client.check(token_ids, max_tokens)
        with pytest.raises(ValueError, match=sentence):
            await generate(client, make_prompt(0, token_ids), 0, Sampling(1.0, max_tokens, (0,), 0))
    assert fake.calls == []


async def test_the_longest_allowed_request_is_sent() -> None:
    async with serving(FakeServer()) as [client]:
        await generate(client, make_prompt(0, (1,) * (CONTEXT - 4)))


async def test_a_refusal_and_a_dead_server_are_sentences() -> None:
    fake = FakeServer()
    fake.fail["/gspo/generate"] = 500
    async with serving(fake) as [client]:
        with pytest.raises(ServerError, match=f"server {fake.url} answered /gspo/generate with 500: .*made to fail"):
            await generate(client, make_prompt(0))
        assert await client.is_healthy()
        stranger = ServerClient(fake.url, "wrong", VOCAB, CONTEXT, 1)
        with pytest.raises(ServerError, match="with 401"):
            await stranger.is_paused()
        await stranger.close()
    gone = ServerClient(fake.url, KEY, VOCAB, CONTEXT, 1)
    assert not await gone.is_healthy()
    with pytest.raises(ServerError, match=f"server {fake.url} is gone"):
        await generate(gone, make_prompt(0))
    await gone.close()


async def test_requests_of_one_moment_leave_in_one_message() -> None:
    fake = FakeServer()
    async with serving(fake) as [client]:
        generations = [Generation(make_prompt(index), 0) for index in range(6)]
        done = await asyncio.gather(*(client.generate(one, SAMPLED, version) for one in generations))
        assert done == ["length"] * 6 and fake.calls == ["/gspo/generate"]
        assert [body["request_id"] for body in fake.bodies] == [f"{index}-0-0-sampled" for index in range(6)]
        assert all(one.token_ids.tolist() == [3, 3, 3] for one in generations)


async def test_one_that_is_refused_leaves_the_others_of_its_message() -> None:
    fake = FakeServer()
    fake.refused = "1-0-0-sampled"
    async with serving(fake) as [client]:
        asked = [generate(client, make_prompt(index)) for index in range(3)]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert first == third == "length"
        assert isinstance(second, RefusedRequest) and "made to be refused" in str(second)


async def test_one_that_nobody_waits_for_is_forgotten_by_the_server() -> None:
    fake = FakeServer()
    fake.gate = 2
    async with serving(fake) as [client]:
        kept, left = Generation(make_prompt(0), 0), Generation(make_prompt(1), 0)
        waiting = [asyncio.create_task(client.generate(one, SAMPLED, version)) for one in (kept, left)]
        await wait_for(lambda: len(kept) == len(left) == 2)
        waiting[1].cancel()
        await wait_for(lambda: fake.forgotten == {"1-0-0-sampled"})
        fake.gate = 9
        assert await waiting[0] == "length" and len(left) == 2
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def test_an_answer_that_misses_the_abort_gets_another() -> None:
    fake = FakeServer()
    fake.gate, fake.missed_aborts = 2, 2
    async with serving(fake) as [client]:
        generation = Generation(make_prompt(0), 0)
        waiting = asyncio.create_task(client.generate(generation, SAMPLED, version))
        while len(generation) < 2:
            await asyncio.sleep(0.01)
        await client.interrupt()
        assert await waiting == "abort" and len(generation) == 2
        assert fake.calls.count("/pause") == 3 and not fake.paused


async def look(fake: FakeServer, times: int) -> None:
    """Wait until the client has looked at the server's progress so many times more: 4 in the time of a stall."""
    enough = fake.calls.count("/metrics") + times
    while fake.calls.count("/metrics") < enough:
        await asyncio.sleep(0.01)


async def test_a_server_without_progress_is_given_up() -> None:
    fake = FakeServer()
    fake.hang = True
    async with serving(fake) as [client]:
        waiting = [asyncio.create_task(generate(client, make_prompt(i))) for i in range(8)]
        while len(fake.bodies) < 8:
            await asyncio.sleep(0.01)
        await client.watch(stall_seconds=0.4)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ServerError) and "made no progress on 8 answers" in str(result)


async def test_progress_and_idleness_are_no_stall() -> None:
    fake = FakeServer()
    fake.hang = True
    async with serving(fake) as [client]:
        watcher = asyncio.create_task(client.watch(stall_seconds=0.4))
        await look(fake, 8)
        # From here on every look finds one more token than the one before.
        fake.tokens_a_look = 1
        waiting = asyncio.create_task(generate(client, make_prompt(0)))
        while not fake.bodies:
            await asyncio.sleep(0.01)
        await look(fake, 8)
        assert not client.fault
        waiting.cancel()
        watcher.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
