"""Tool calls in the text of a turn, as Qwen3 writes them: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{CALL_START}(.*?){CALL_END}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call."""

    name: str
    """Of the tool."""
    arguments: dict[str, Any]
    """By name, as JSON has them."""


@dataclass(frozen=True, slots=True)
class TurnText:
    """The text of a turn without its calls, and the calls."""

    content: str
    calls: tuple[ToolCall, ...]
    is_malformed: bool
    """It holds the start of a call that cannot be read; then `content` is the whole text and `calls` is empty."""


def read_turn(text: str) -> TurnText:
    """Split the text of a turn. One call that cannot be read makes the whole turn text."""
    found = [_read_call(match[1]) for match in _CALL.finditer(text)]
    calls = tuple(call for call in found if call is not None)
    content = _CALL.sub("", text)
    if len(calls) < len(found) or CALL_START in content:
        return TurnText(text, (), True)
    return TurnText(content.strip() if calls else content, calls, False)


def _read_call(text: str) -> ToolCall | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None
