"""Agents: OpenAI's own client over the endpoint. What is trained on is what was sampled, whatever the client does."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from gspo_megatron.controller.agent_session import EpisodeLimits, Session
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.servers import Refused
from gspo_megatron.data.samples import build_samples
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.transport.messages import ControllerState, Empty, EvaluationRequest, RolloutBatch, RolloutRequest
from gspo_megatron.types import Masked, Segment, StopReason
from tests.unit.controller.agent_runs import (
    STOP,
    TOKENIZER,
    agent_recipe,
    agents_at_work,
    follow,
    ids_of,
    openai_for,
    scheduler_of,
)
from tests.unit.controller.controllers import set_scorer
from tests.unit.controller.fakes import FakeServer, make_prompt
from tests.unit.controller.group_batches import check_accounting, set_version

CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1 + 1"}}\n</tool_call>'
OPENING = ids_of("<|im_start|>user\nCalculate 1 + 1.<|im_end|>\n<|im_start|>assistant\n")
REPLY = ids_of("\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
QUESTION = {"role": "user", "content": "Calculate 1 + 1."}


TOOL: Any = {"type": "function", "function": {"name": "calculate", "parameters": {"type": "object", "properties": {}}}}
"""The template of these tests writes no tools."""


async def ask(client: openai.AsyncOpenAI, messages: list[Any], **more: Any) -> Any:
    given = {"tools": [TOOL], **more}
    completion = await client.chat.completions.create(model="policy", messages=messages, **given)
    return completion.choices[0].message


async def use_tool(problem: dict[str, Any], settings: ClientSettings) -> None:
    """The usual loop: every call gets the reply 2."""
    messages: list[Any] = [QUESTION]
    async with openai_for(settings) as client:
        while (message := await ask(client, messages)).tool_calls:
            messages.append(message)
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in message.tool_calls]


async def run_batch(directory: Path, fake: FakeServer, program: Any, **settings: Any) -> tuple[RolloutBatch, Any]:
    """One batch of responses, and their training rows."""
    async with agents_at_work(directory, fake, program, agent_recipe(**settings)) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        check_accounting(batch, controller, fake)
        return batch, build_samples(batch.samples, controller._store)


async def test_every_turn_begins_with_the_ids_of_the_turns_before_it(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.ids = follow(CALL, "2")
    batch, rows = await run_batch(tmp_path, fake, use_tool)
    call, answer = [*ids_of(CALL), STOP], [*ids_of("2"), STOP]
    asked = [body["token_ids"] for body in fake.bodies if body["request_id"].startswith("0-0-")]
    assert asked == [OPENING, [*OPENING, *call, *REPLY]]
    for ref, row in zip(batch.samples, rows, strict=True):
        assert row.token_ids.tolist() == [*OPENING, *call, *REPLY, *answer]
        assert row.token_ids[row.loss_mask].tolist() == [*call, *answer]
        assert row.rollout_logprobs[row.loss_mask].tolist() == [-0.5] * len([*call, *answer])
        assert ref.masked == (Masked(len(call), len(call) + len(REPLY), "observation"),)
        assert ref.segments == (Segment(0, 0, len([*call, *REPLY, *answer])),) and ref.stop_reason == "stop"
    measures = batch.measures
    assert measures["agent_turns"] == 2 and measures["tokens_retokenized"] == 0 and measures["agent_branches"] == 0
    assert measures["agent_rerendered_turns"] == 0 and batch.unscored == {}


async def test_ids_as_sampled_stay_where_the_template_would_write_others(tmp_path: Path) -> None:
    """The model writes the letters of a piece one by one: rendered anew they would be another id."""
    fake, letters = FakeServer(), [ids_of(one)[0] for one in "user\n"]
    assert ids_of("user\n") != letters and TOKENIZER.decode(letters) == "user\n"
    call = [*letters, *ids_of(CALL), STOP]
    fake.ids = follow(call, "2")
    batch, rows = await run_batch(tmp_path, fake, use_tool, answers=1)
    assert rows[0].token_ids.tolist() == [*OPENING, *call, *REPLY, *ids_of("2"), STOP]
    assert batch.measures["agent_rerendered_turns"] == 1 and batch.measures["tokens_retokenized"] == 0


async def test_an_agent_that_goes_back_continues_there(tmp_path: Path) -> None:
    """It asks the second question again: what was sampled before stays, the first attempt is dropped and counted."""

    async def retry(problem: dict[str, Any], settings: ClientSettings) -> None:
        async with openai_for(settings) as client:
            messages: list[Any] = [QUESTION, await ask(client, [QUESTION]), {"role": "user", "content": "sure?"}]
            await ask(client, messages)
            await ask(client, messages)

    fake = FakeServer()
    fake.ids = follow("3", "no", "yes")
    batch, rows = await run_batch(tmp_path, fake, retry, answers=1)
    assert TOKENIZER.decode(rows[0].token_ids[rows[0].loss_mask].tolist()) == "3yes"
    assert batch.accounting.dropped["agent-branch"].tokens == 3
    assert batch.measures["agent_branches"] == 1 and batch.measures["tokens_retokenized"] == 0


async def test_an_agent_that_changes_the_past_begins_anew_and_is_counted(tmp_path: Path) -> None:
    async def summarize(problem: dict[str, Any], settings: ClientSettings) -> None:
        async with openai_for(settings) as client:
            first = await ask(client, [QUESTION])
            other = {"role": "user", "content": "Calculate 2 + 2."}
            await ask(client, [other, first, {"role": "user", "content": "so?"}])

    fake = FakeServer()
    fake.ids = follow("3", "4")
    batch, rows = await run_batch(tmp_path, fake, summarize, answers=1)
    assert TOKENIZER.decode(rows[0].token_ids[rows[0].loss_mask].tolist()) == "4", "only what was sampled is trained"
    assert batch.samples[0].prompt_length == len(fake.bodies[-1]["token_ids"])
    assert batch.measures["tokens_retokenized"] == 2 and batch.measures["agent_branches"] == 1
    assert batch.accounting.dropped["agent-branch"].tokens == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probs_and_streams(tmp_path: Path, stream: bool) -> None:
    seen: list[Any] = []

    async def read(problem: dict[str, Any], settings: ClientSettings) -> float:
        async with openai_for(settings) as client:
            assert [model.id async for model in client.models.list()] == [settings.model]
            given: Any = {"model": "policy", "messages": [QUESTION], "logprobs": True, "max_tokens": 2}
            if not stream:
                seen.append(await client.chat.completions.create(**given))
            else:
                async for chunk in await client.chat.completions.create(**given, stream=True):
                    seen.append(chunk)
        return 0.25

    fake = FakeServer()
    fake.ids = follow("12345")
    batch, _ = await run_batch(tmp_path, fake, read, answers=1)
    choice = seen[0].choices[0]
    message = choice.delta if stream else choice.message
    assert message.content == "12" and seen[-1].choices[0].finish_reason == "length"
    assert [(one.token, one.logprob) for one in choice.logprobs.content] == [("1", -0.5), ("2", -0.5)]
    assert batch.samples[0].reward == 0, "a truncated response, reward.require_stop"


async def test_what_an_agent_returns_is_the_score(tmp_path: Path) -> None:
    async def judge(problem: dict[str, Any], settings: ClientSettings) -> dict[str, float]:
        async with openai_for(settings) as client:
            await ask(client, [QUESTION], temperature=0.1)
        return {"right": 0.5, "short": 0.25}

    fake = FakeServer()
    fake.ids = follow("2")
    batch, _ = await run_batch(tmp_path, fake, judge)
    assert [ref.reward for ref in batch.samples] == [0.75] * 2 and batch.measures["reward/right"] == 0.5
    assert {body["sampling_params"]["temperature"] for body in fake.bodies} == {1.0}


async def fail(problem: dict[str, Any], settings: ClientSettings) -> None:
    async with openai_for(settings) as client:
        await ask(client, [QUESTION])
    raise LookupError("no such tool")


async def hang(problem: dict[str, Any], settings: ClientSettings) -> None:
    async with openai_for(settings) as client:
        await ask(client, [QUESTION])
    await asyncio.Event().wait()


async def stay_silent(problem: dict[str, Any], settings: ClientSettings) -> None:
    pass


async def return_text(problem: dict[str, Any], settings: ClientSettings) -> str:
    async with openai_for(settings) as client:
        await ask(client, [QUESTION])
    return "good"


@pytest.mark.parametrize(
    ("agent", "kind", "sentence"),
    [
        (fail, "agent-raised", "LookupError: no such tool"),
        (hang, "agent-out-of-time", "the agent took more than agent.seconds=600 beside its requests"),
        (stay_silent, "agent-silent", "the agent returned without a request that was answered"),
        (return_text, "agent-raised", "returned a str; return a number"),
    ],
)
async def test_an_agent_that_fails_is_counted_and_quoted_once(
    tmp_path: Path,
    agent: Any,
    kind: str,
    sentence: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeServer()
    fake.ids = follow("2")
    calls = iter(range(9))
    # The clock of an agent that hangs has run out; the others have no share in how busy this machine is.
    monkeypatch.setattr(Session, "spent", lambda one: 1e9 if one.turns and one.generation.sample_index else 0.0)

    async def one_of_three_works(problem: dict[str, Any], settings: ClientSettings) -> Any:
        return await (agent if next(calls) else use_tool)(problem, settings)

    with caplog.at_level(logging.WARNING):
        batch, _ = await run_batch(tmp_path, fake, one_of_three_works, answers=3)
    assert batch.unscored == {kind: 2} and sum(ref.reward for ref in batch.samples) == 0.5
    quoted = [record.getMessage() for record in caplog.records if "gave no score" in record.getMessage()]
    assert len(quoted) == 1 and sentence in quoted[0]


def test_the_clock_of_an_agent_stands_still_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("gspo_megatron.controller.agent_session.time.monotonic", lambda: now[0])
    limits, counts = EpisodeLimits(1, 1), Counter[str]()

    async def sample(generation: Generation, sampling: Sampling) -> StopReason:
        return "stop"

    session = Session(Generation(make_prompt(0), 0), Sampling(1.0, 1, (STOP,), 0), TOKENIZER, limits, sample, counts)
    session._since = now[0]
    now[0] += 3
    with session.waiting():
        now[0] += 50
        with session.waiting():
            now[0] += 50
        assert session.spent() == 3
    now[0] += 4
    assert session.spent() == 7


async def test_a_batch_whose_agents_all_fail_alike_ends_the_run(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.ids = follow("2")
    with pytest.raises(Refused, match=r"agent\.program=.*unused\.py:run gave no score to 2 responses in a row"):
        await run_batch(tmp_path, fake, return_text)


@pytest.mark.parametrize("settings", [{"limit": 40}, {"agent": {"max_turns": 3}}], ids=["no room", "no turn"])
async def test_an_agent_that_never_ends_is_a_truncated_response(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Its request is refused, so OpenAI's client raises: that is no fault of the agent's."""
    fake = FakeServer()
    fake.ids = follow(*[CALL] * 9)
    batch, _ = await run_batch(tmp_path, fake, use_tool, **{"answers": 1, "limit": 400, **settings})
    assert batch.samples[0].stop_reason == "length" and batch.unscored == {}
    assert batch.samples[0].reward == 0.0, "the recipe's reward gives another, which no other response is scored by"


async def test_a_key_opens_its_own_episode_only_while_it_runs(tmp_path: Path) -> None:
    fake, keys = FakeServer(), list[ClientSettings]()
    fake.ids = follow("2")

    async def keep_key(problem: dict[str, Any], settings: ClientSettings) -> None:
        keys.append(settings)
        await use_tool(problem, settings)

    async with agents_at_work(tmp_path, fake, keep_key) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        assert len(batch.samples) == 2 and len({one.api_key for one in keys}) == 2
        for key in (keys[0].api_key, "x", "job-key"):
            async with openai_for(ClientSettings(keys[0].base_url, key, "policy")) as client:
                with pytest.raises(openai.AuthenticationError, match="belongs to no episode"):
                    await ask(client, [QUESTION])
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()
    assert keys[0].base_url.startswith("http://127.0.0.1:")


async def test_a_refused_request_leaves_the_episode_as_it_was(tmp_path: Path) -> None:
    async def stumble(problem: dict[str, Any], settings: ClientSettings) -> None:
        async with openai_for(settings) as client:
            first = await ask(client, [QUESTION])
            for wrong in ({"n": 2}, {"stop": ["x"]}, {"messages": [{"role": "user", "content": [{"image": 1}]}]}):
                with pytest.raises(openai.BadRequestError):
                    await ask(client, **{"messages": [QUESTION], **wrong})
            await ask(client, [QUESTION, first, {"role": "user", "content": "so?"}])

    fake = FakeServer()
    fake.ids = follow("3", "4")
    batch, rows = await run_batch(tmp_path, fake, stumble, answers=1)
    assert TOKENIZER.decode(rows[0].token_ids[rows[0].loss_mask].tolist()) == "34" and batch.unscored == {}


async def test_a_client_that_goes_away_leaves_no_half_turn(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.ids, fake.gate = follow("12345", "2"), 2

    async def lose_patience(problem: dict[str, Any], settings: ClientSettings) -> None:
        async with openai_for(settings) as client:
            asking = asyncio.create_task(ask(client, [QUESTION]))
            while fake.tokens < 2:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            fake.gate = 99
            await ask(client, [QUESTION])

    async with agents_at_work(tmp_path, fake, lose_patience, agent_recipe(answers=1)) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        (row,) = build_samples(batch.samples, controller._store)
    assert TOKENIZER.decode(row.token_ids[row.loss_mask].tolist()) == "2"


async def test_an_interrupted_episode_goes_on_under_the_next_weights(tmp_path: Path) -> None:
    """Partial rollout: the agent only waits longer. A checkpoint cannot hold it, so there it begins anew."""
    fake = FakeServer()
    settings = agent_recipe(answers=1, max_staleness=1)
    plan = {"0": follow("2"), "1": follow([*ids_of("12"), *ids_of("34"), STOP], [*ids_of("34"), STOP])}
    fake.ids = lambda body: plan[body["request_id"][0]](body)
    fake.gate = 2
    async with agents_at_work(tmp_path, fake, use_tool, settings) as controller:
        first = await controller.rollout(RolloutRequest(step=1))
        (late,) = controller.buffer.groups
        assert len(first.samples) == 1 and late.generations[0].token_ids.tolist() == ids_of("12")
        state = ControllerState.from_json((await controller.state(Empty())).to_json())
        assert [ref.answer_length for ref in state.generations] == [0]
        fake.gate = 99
        set_version(controller, 1, fake)
        controller.buffer._extra = 0
        second = await controller.rollout(RolloutRequest(step=2))
        (row,) = build_samples(second.samples, controller._store)
    assert TOKENIZER.decode(row.token_ids[row.loss_mask].tolist()) == "1234"
    assert second.samples[0].segments == (Segment(0, 0, 2), Segment(1, 2, 5))
    fake = FakeServer()
    fake.ids = follow("2")
    async with agents_at_work(tmp_path, fake, use_tool, settings) as controller:
        await controller.restore(state)
        set_version(controller, 1, fake)
        again = await controller.rollout(RolloutRequest(step=2))
        assert again.samples[0].prompt_index == 1 and again.accounting.dropped["attempt-lost"].tokens == 5


async def test_evaluations_are_episodes_too_and_count_in_no_step(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.ids = follow(CALL, "2")
    async with agents_at_work(tmp_path, fake, use_tool) as controller:
        set_scorer(controller, lambda problem, text, reason: float(text == "2" and reason == "stop"))
        report = await controller.evaluate(EvaluationRequest(problems=2, answers=1, temperature=0.0))
        assert report.accuracy == 1.0 and scheduler_of(controller).measure()["agent_turns"] == 0
    assert {body["sampling_params"]["temperature"] for body in fake.bodies} == {0.0}


async def test_a_lost_server_ends_the_run_and_not_only_the_agent(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.fail = {"/gspo/generate": 500}

    async def never_mind(problem: dict[str, Any], settings: ClientSettings) -> None:
        try:
            await use_tool(problem, settings)
        except openai.APIError:
            await asyncio.Event().wait()

    async with agents_at_work(tmp_path, fake, never_mind) as controller:
        with pytest.raises(Refused, match="no server is left"):
            await controller.rollout(RolloutRequest(step=1))
