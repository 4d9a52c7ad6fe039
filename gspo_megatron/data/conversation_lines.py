"""The prompt of a line as a conversation: system message, earlier turns, tools."""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

ASKING = ("user", "tool")
"""Roles of a last message that a response can follow; a system message alone asks nothing."""


def read_messages(value: list[Any]) -> tuple[dict[str, Any], ...]:
    """Return the messages of a prompt, with their contents as text.

    Raises:
        ValueError: it is no conversation that a response can continue; a sentence that reads on from `LINE has`.
    """
    messages = tuple(_read_message(message, number) for number, message in enumerate(value, start=1))
    if not messages:
        raise ValueError("messages of no turn; write at least the user's")
    last = messages[-1]["role"]
    if last == "assistant":
        raise ValueError(
            "messages that end in an assistant's turn, which would be part of the prompt; remove that turn, or keep it "
            "under another key"
        )
    if last not in ASKING:
        raise ValueError(f"messages that end in a turn of {last!r}; end in the user's")
    return messages


def _read_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"messages of which number {number} is no object; write role and content")
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and role):
        raise ValueError(f"messages of which number {number} has role={role!r}; write system, user, assistant or tool")
    if isinstance(content, list):
        content = _join_parts(content, number)
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"messages of which number {number} ({role}) has content={str(content)[:40]!r}; write a text")
    if role != "assistant" and not content.strip():
        raise ValueError(f"messages of which number {number} ({role}) is empty; write a text")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"messages of which number {number} has tool_calls that are no list; write one")
    read = {"tool_calls": [_read_call(call, number) for call in calls]} if calls else {}
    return {**message, "content": content, **read}


def _read_call(call: Any, number: int) -> dict[str, Any]:
    """A call as a template takes it; clients write JSON text."""
    if not (isinstance(call, dict) and isinstance(call.get("function"), dict)):
        raise ValueError(f"messages of which number {number} has tool_calls without `function`; write it")
    return with_argument_object(call)


def with_argument_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as an object, as templates expect them; what is no JSON stays a text."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


def _join_parts(parts: list[Any], number: int) -> str:
    """The text of a content that comes in parts; only texts are read here."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"messages of which number {number} has a part of type {kind!r}; only texts are read")
    return "".join(part["text"] for part in parts)


def read_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Return the tools of a line; a text is read as JSON, as tables often hold them.

    Raises:
        ValueError: they are no list of objects; a sentence that reads on from `LINE has`.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError("tools in a text that is not JSON; write a list of objects") from None
    if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError("tools that are no list of objects; write them by the JSON schema of OpenAI's interface")
    return tuple(value)


def problem_id(question: str, messages: Sequence[Any] = (), tools: Sequence[Any] = ()) -> str:
    """Return the stable id of a prompt: 16 hex digits of a SHA-256.

    A conversation of the user's turn alone is the same prompt as its text.
    """
    content = question if not messages and not tools else json.dumps([messages, tools], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def question_key(question: str, messages: Sequence[dict[str, Any]] = ()) -> str:
    """Return what two spellings of one question share: the rule by which questions are held out.

    System messages do not count. Unicode compatibility forms, case, invisible characters, and the kind and number of
    blanks and line feeds do not either. It errs on the side of holding out.
    """
    asked = [str(message["content"]) for message in messages if message["role"] != "system"] or [question]
    text = unicodedata.normalize("NFKC", "\n".join(asked)).casefold()
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    spelled = " ".join(unicodedata.normalize("NFKC", visible).split())
    return hashlib.sha256(spelled.encode()).hexdigest()[:16]
