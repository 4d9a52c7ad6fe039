"""A controller with a real server: complete groups, readable samples, exact accounting."""

from __future__ import annotations

import asyncio

import httpx

from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.transport.auth import key_header
from gspo_megatron.transport.messages import Accounting, EvaluationRequest, RolloutRequest, TokenCount
from tests.rollout.tiny import KEY, STOP, VOCAB, CountingPrompts
from tests.rollout.updates import update


async def count_tokens(url: str) -> int:
    client = ServerClient(url, KEY, VOCAB, 64, 1)
    try:
        return await client.generated_tokens()
    finally:
        await client.close()


def test_a_batch_is_complete_readable_and_repeatable(start_controller, oracles) -> None:
    controller, link = start_controller()
    update(link, 3, oracles[0])
    state = link.state()
    seen = []
    batch = link.rollout(RolloutRequest(step=1), on_progress=seen.append)
    refs = batch.samples
    assert [(ref.prompt_index, ref.sample_index) for ref in refs] == [(p, s) for p in range(8) for s in range(4)]
    taken = TokenCount(tokens=batch.tokens, prompts=8)
    assert batch.accounting == Accounting(sampled_tokens=batch.tokens, taken=taken, dropped={}, in_flight=TokenCount())
    assert batch.unscored == batch.skipped_prompts == {}
    assert seen[-1].done == seen[-1].total == 32 and seen[-1].tokens == batch.tokens
    prompts = CountingPrompts().next(8)
    read = [controller.store.read(ref) for ref in refs]
    for ref, (token_ids, answer_start, logprobs) in zip(refs, read, strict=True):
        answer = token_ids[answer_start:].tolist()
        assert tuple(token_ids[:answer_start].tolist()) == prompts[ref.prompt_index].token_ids
        assert len(answer) == len(logprobs) == ref.answer_length <= 20
        assert (ref.stop_reason == "stop") == (answer[-1] == STOP) and STOP not in answer[:-1]
        assert ref.reward == float((len(answer) - (answer[-1] == STOP)) % 2 == 0)
        assert [(s.version, s.start, s.end) for s in ref.segments] == [(3, 0, len(answer))]
    group = [tuple(ids[start:].tolist()) for ids, start, _ in read[:4]]
    assert len(set(group)) == 4, "the answers to one prompt are the same: their seeds are"
    before = asyncio.run(count_tokens(controller.server_urls[0]))
    following = link.rollout(RolloutRequest(step=2))
    assert following.samples[0].prompt_index == 8
    # What the watchdog looks at.
    assert asyncio.run(count_tokens(controller.server_urls[0])) - before == following.tokens

    link.restore(state)
    again = link.rollout(RolloutRequest(step=1)).samples
    assert [controller.store.read(ref)[0].tolist() for ref in again] == [ids.tolist() for ids, _, _ in read]


def test_evaluation_is_greedy_and_stores_nothing(start_controller, oracles) -> None:
    controller, link = start_controller()
    update(link, 0, oracles[0])
    found = [link.evaluate(EvaluationRequest(problems=6, answers=1, temperature=0.0)) for _ in range(2)]
    assert found[0] == found[1]
    assert 0 <= found[0].accuracy <= 1 and found[0].mean_reward == found[0].accuracy
    assert [example.question for example in found[0].examples] == [f"question {i}" for i in (-1, -2, -3)]
    assert list(controller.store.directory.glob("written_*")) == []


def test_only_the_key_opens_the_controller(start_controller) -> None:
    controller, _ = start_controller()
    for headers in ({}, key_header("wrong")):
        assert httpx.get(f"{controller.url}/status", headers=headers).status_code == 401
        assert httpx.post(f"{controller.url}/rollout", json={"step": 0}, headers=headers).status_code == 401
    assert httpx.get(f"{controller.url}/health").status_code == 200
