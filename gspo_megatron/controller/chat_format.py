"""OpenAI's chat-completion interface, read and written in one place.

Sampling is the run's: a client's own temperature would make the trainer's log-probs wrong. What a client may set, what
is left aside with a warning and what is refused stand in three tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.data.conversation_lines import with_argument_object
from gspo_megatron.environments.tool_calls import TurnText
from gspo_megatron.types import StopReason

MODEL = "policy"
"""Name of the model for clients."""
READ = ("model", "messages", "tools", "tool_choice", "max_tokens", "max_completion_tokens", "stream", "stream_options",
        "logprobs", "n")  # fmt: skip
OVERRULED = ("temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
             "repetition_penalty", "reasoning_effort", "verbosity")  # fmt: skip
"""Left aside: the recipe decides how responses are drawn."""
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                  "prompt_cache_retention", "parallel_tool_calls")  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")


class RequestError(ValueError):
    """A request that is refused, as OpenAI refuses it: status 400 with a code."""

    def __init__(self, sentence: str, code: str = "invalid_request") -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asks for."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    reads_calls: bool
    """False with `tool_choice=none` or without tools: calls stay text."""
    max_tokens: int | None
    """Most tokens of this turn; None = as many as the response has left."""
    stream: bool
    include_usage: bool
    """The stream ends with the counts of tokens."""
    logprobs: bool
    overruled: tuple[str, ...]
    """Keys that the client set and that the recipe decides."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A sampled turn, as it is written for a client."""

    turn: TurnText
    reason: StopReason
    prompt_tokens: int
    pieces: tuple[str, ...]
    """[n] text of each token, without masked ones."""
    logprobs: tuple[float, ...]
    """[n]; empty for greedy turns."""
    number: int
    """Of the turn in its episode, which names it and its calls."""
    completion_tokens: int

    def finish_reason(self) -> str:
        """OpenAI's word for why the turn ended."""
        if self.turn.calls:
            return "tool_calls"
        return "stop" if self.reason == "stop" else "length"

    def message(self) -> dict[str, Any]:
        """The assistant's message. A client sends it back with its next request."""
        calls = [
            {
                "id": f"call_{self.number}_{place}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for place, call in enumerate(self.turn.calls)
        ]
        content = self.turn.content if self.turn.content or not calls else None
        return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def read_request(body: bytes) -> ChatRequest:
    """Parse a request. Raises RequestError."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("the body is no JSON object; send model and messages")
    given = {name: value for name, value in values.items() if value not in (None, [], {})}
    if unknown := sorted(set(given) - {*READ, *OVERRULED, *WITHOUT_EFFECT}):
        raise RequestError(f"{unknown[0]} is not supported by this endpoint; leave it out", "unsupported_parameter")
    if given.get("n", 1) != 1:
        raise RequestError(f"n={given['n']} is not supported; ask n times", "unsupported_parameter")
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise RequestError(f"tool_choice={json.dumps(choice)} is not supported; use auto or none")
    limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if any(not isinstance(limit, int) or isinstance(limit, bool) or limit < 1 for limit in limits):
        raise RequestError(f"max_tokens={limits[0]} is no positive whole number; correct it or leave it out")
    tools, options = given.get("tools", []), given.get("stream_options", {})
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError("tools is no list of objects; send each tool in OpenAI's format")
    return ChatRequest(
        messages=_read_messages(given.get("messages")),
        tools=tuple(tools),
        reads_calls=bool(tools) and choice == "auto",
        max_tokens=min(limits, default=None),
        stream=bool(given.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        logprobs=bool(given.get("logprobs")),
        overruled=tuple(name for name in OVERRULED if name in given),
    )


def _read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages is no list with a message in it; send at least the user's")
    return tuple(_read_message(message, place) for place, message in enumerate(value))


def _read_message(message: Any, place: int) -> dict[str, Any]:
    """One message with the keys that templates read; content as one text."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"messages[{place}] has no role of {', '.join(ROLES)}; give it one")
    role = "system" if message["role"] == "developer" else message["role"]
    read: dict[str, Any] = {"role": role, "content": _read_content(message.get("content"), place)}
    if calls := message.get("tool_calls"):
        try:
            read["tool_calls"] = [
                {
                    "id": call.get("id", ""),
                    "type": "function",
                    "function": {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
                }
                for call in calls
            ]
        except (LookupError, TypeError, AttributeError):
            raise RequestError(
                f"messages[{place}].tool_calls is not in OpenAI's format; send it back as it was"
            ) from None
    return read | {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}


def _read_content(content: Any, place: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    try:
        return "".join(part["text"] for part in content)
    except (TypeError, LookupError):
        raise RequestError(
            f"messages[{place}].content is neither a text nor a list of text parts; send text only"
        ) from None


def same_message(sent: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether a client's message is the recorded one. Of a model's turn it may have dropped blanks or the thinking."""
    if sent["role"] != recorded["role"] or _calls(sent) != _calls(recorded):
        return False
    if sent["role"] != "assistant":
        return sent == recorded
    whole = recorded.get("content") or ""
    spoken = whole.rpartition("</think>")[2]
    return sent["content"].strip() in (whole.strip(), spoken.strip())


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    made = []
    for call in message.get("tool_calls", ()):
        function = with_argument_object(call)["function"]
        made.append((function["name"], function["arguments"]))
    return made


def write_completion(turn: ChatTurn, request: ChatRequest, episode: str) -> dict[str, Any]:
    """The body of a response."""
    choice = {"index": 0, "message": turn.message(), "finish_reason": turn.finish_reason()}
    choice["logprobs"] = _write_logprobs(turn) if request.logprobs else None
    return {**_head(turn, "chat.completion", episode), "choices": [choice], "usage": _usage(turn)}


def write_chunks(turn: ChatTurn, request: ChatRequest, episode: str) -> list[dict[str, Any]]:
    """The same as the chunks of a stream."""
    head, delta = _head(turn, "chat.completion.chunk", episode), turn.message()
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(delta["tool_calls"])]
    logprobs = _write_logprobs(turn) if request.logprobs else None
    choices = [
        {"index": 0, "delta": delta, "finish_reason": None, "logprobs": logprobs},
        {"index": 0, "delta": {}, "finish_reason": turn.finish_reason()},
    ]
    chunks = [{**head, "choices": [choice]} for choice in choices]
    return [*chunks, *([{**head, "choices": [], "usage": _usage(turn)}] if request.include_usage else [])]


def write_error(sentence: str, code: str) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": code}}


def write_models() -> dict[str, Any]:
    """The body of `/v1/models`."""
    return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "gspo-megatron"}]}


def _head(turn: ChatTurn, kind: str, episode: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{episode}-{turn.number}", "object": kind, "created": int(time.time()), "model": MODEL}


def _usage(turn: ChatTurn) -> dict[str, int]:
    total = turn.prompt_tokens + turn.completion_tokens
    return {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.completion_tokens, "total_tokens": total}


def _write_logprobs(turn: ChatTurn) -> dict[str, Any] | None:
    if not turn.logprobs:
        return None
    rows: Sequence[tuple[str, float]] = list(zip(turn.pieces, turn.logprobs, strict=True))
    content = [
        {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": []} for piece, value in rows
    ]
    return {"content": content, "refusal": None}
