"""Conversations as token ids that only grow: what a chat template adds behind a sampled turn.

A turn that was sampled is never rendered and tokenized again. Between two turns of the model, the template's rendering
of the new messages alone is appended: it is taken from a conversation whose last turn is a mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gspo_megatron.data.conversation_lines import with_argument_object

Message = Mapping[str, Any]
"""One message as OpenAI's chat interface has it: `role`, `content`, and `tool_calls` or `tool_call_id`."""
MARK = "turn-of-the-model"
"""Content of the assistant's turn that stands in for the sampled one."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer with a chat template that conversations use."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def encode_text(self, text: str) -> list[int]: ...
    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool) -> str: ...


def encode_opening(tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
    """Return the ids of a conversation up to the start of the model's next turn.

    Raises:
        ValueError: the chat template refuses the messages.
    """
    return tokenizer.encode_text(_render(tokenizer, messages, tools, True))


def encode_continuation(tokenizer: ChatTokenizer, messages: Sequence[Message], last_id: int | None) -> list[int]:
    """Return the ids that follow a sampled turn: its end, the new messages, the start of the next turn.

    Args:
        tokenizer: with a chat template.
        messages: what came after the turn, in order; no message of the model.
        last_id: last id of the turn. A stop id that the template writes there too is not written twice.

    Raises:
        ValueError: the chat template refuses the messages, or drops the turn before them.
    """
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    _, found, rest = _render(tokenizer, [*before, *messages], None, True).rpartition(MARK)
    if not found:
        raise ValueError("the chat template leaves out an assistant's turn before the last messages; use another one")
    ids = tokenizer.encode_text(rest)
    return ids[1:] if ids and ids[0] == last_id and last_id in tokenizer.stop_ids else ids


def encode_turn(tokenizer: ChatTokenizer, message: Message) -> list[int]:
    """Return the ids of a written turn of the model as it would sample them, its stop id included.

    Raises:
        ValueError: the template writes no stop id behind it, or another beginning than it gives the model.
    """
    question = [{"role": "user", "content": "a"}]
    opening = _render(tokenizer, question, None, True)
    whole = _render(tokenizer, [*question, message], None, False)
    if not whole.startswith(opening):
        # Else the question would count as a part of the turn.
        raise ValueError("the chat template begins a written turn in another way than the turn that it asks for")
    ids = tokenizer.encode_text(whole.removeprefix(opening))
    end = next((place for place, one in enumerate(ids) if one in tokenizer.stop_ids), None)
    if end is None:
        raise ValueError("the chat template ends an assistant's turn without a stop id; add one to the tokenizer")
    return ids[: end + 1]


def _render(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool
) -> str:
    """The text of the template, whose own errors are sentences of its author's."""
    plain = [_with_arguments(message) for message in messages]
    try:
        return tokenizer.render(plain, tools, generation_prompt)
    # A template is a program: it raises what it likes.
    except Exception as error:
        raise ValueError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from None


def _with_arguments(message: Message) -> dict[str, Any]:
    """A message whose calls hold their arguments as an object, as templates expect them; clients send JSON text."""
    made = dict(message)
    if made.get("tool_calls"):
        made["tool_calls"] = [with_argument_object(call) for call in made["tool_calls"]]
    if made.get("content") is None:
        made["content"] = ""
    return made
