"""OpenAI's interface: what is read, overruled and refused, and what a client gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gspo_megatron.controller.chat_format import (
    ChatTurn,
    RequestError,
    read_request,
    same_message,
    write_chunks,
    write_completion,
)
from gspo_megatron.environments.tool_calls import read_turn

USER = {"role": "user", "content": "hi"}


def request(**values: Any) -> bytes:
    return json.dumps({"model": "policy", "messages": [USER], **values}).encode()


def test_a_request_is_read() -> None:
    read = read_request(request(temperature=0.3, max_tokens=7, user="me", tools=[{"a": 1}], stop=None))
    assert read.messages == (USER,) and read.max_tokens == 7 and read.overruled == ("temperature",)
    assert read.tools == ({"a": 1},) and read.reads_calls and not read.stream
    assert not read_request(request()).reads_calls, "without tools nothing can be called"
    assert not read_request(request(tools=[{"a": 1}], tool_choice="none")).reads_calls
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_request(request(messages=[{"role": "developer", "content": parts}])).messages == (
        {"role": "system", "content": "ab"},
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"[", "the body is no JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "the body is no JSON"),
        (request(messages=[]), "no list with a message"),
        (request(messages="hi"), "no list with a message"),
        (request(messages=[{"role": "judge", "content": "a"}]), r"messages\[0\] has no role"),
        (request(messages=[{"role": "user", "content": [{"image_url": "x"}]}]), r"messages\[0\].content is neither"),
        (request(messages=[{"role": "user", "content": 5}]), r"messages\[0\].content is neither"),
        (request(messages=[{"role": "assistant", "tool_calls": ["x"]}]), r"messages\[0\].tool_calls is not"),
        (request(n=2), "n=2 is not supported"),
        (request(stop=["a"]), "stop is not supported"),
        (request(response_format={"type": "json_object"}), "response_format is not supported"),
        (request(tool_choice="required"), 'tool_choice="required" is not supported'),
        (request(max_tokens=0), "max_tokens=0 is no positive whole number"),
        (request(max_tokens=True), "max_tokens=True is no positive whole number"),
        (request(max_tokens="many"), "max_tokens=many is no positive whole number"),
        (request(tools=[5]), "tools is no list of objects"),
    ],
)
def test_what_is_refused(body: bytes, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        read_request(body)


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls", "malformed"),
    [
        ("plain", "plain", 0, False),
        (f"first {CALL}", "first", 1, False),
        (CALL * 2, "", 2, False),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", 0, True),
        ("<tool_call>\n{", "<tool_call>\n{", 0, True),
        (f"{CALL}<tool_call>[1]</tool_call>", f"{CALL}<tool_call>[1]</tool_call>", 0, True),
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>',) * 2 + (0, True),
    ],
)
def test_calls_of_a_turn(text: str, content: str, calls: int, malformed: bool) -> None:
    turn = read_turn(text)
    assert (turn.content, len(turn.calls), turn.is_malformed) == (content, calls, malformed)


def made(text: str) -> ChatTurn:
    return ChatTurn(read_turn(text), "stop", 5, ("a", "b"), (-0.5, -0.25), 1, 2)


def test_openai_s_own_types_read_what_is_written() -> None:
    asked = read_request(request(logprobs=True, stream=True, stream_options={"include_usage": True}))
    whole = ChatCompletion.model_validate(write_completion(made(f"so {CALL}"), asked, "e"), strict=True)
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "so"
    assert choice.message.tool_calls and choice.message.tool_calls[0].function.arguments == '{"x": 1}'  # type: ignore[union-attr]
    assert choice.logprobs and [one.logprob for one in choice.logprobs.content or ()] == [-0.5, -0.25]
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in write_chunks(made("so"), asked, "e")]
    assert [chunk.choices[0].delta.content for chunk in chunks[:2]] == ["so", None]
    assert chunks[1].choices[0].finish_reason == "stop" and chunks[2].usage and chunks[2].usage.total_tokens == 7


def test_a_message_that_comes_back_is_known() -> None:
    recorded = made(f"<think>hm</think> so {CALL}").message() | {"content": "<think>hm</think> so"}
    back = read_request(request(messages=[USER, made(f"<think>hm</think> so {CALL}").message()])).messages[1]
    assert same_message(back, recorded)
    assert same_message(back | {"content": " so\n"}, recorded), "a client may drop the thinking"
    assert not same_message(back | {"content": "no"}, recorded)
    assert not same_message({**back, "tool_calls": []}, recorded)
    assert not same_message(USER, {**USER, "content": "ho"})
