"""Conversations as ids: what is appended between sampled turns is what the template writes, and nothing is rendered
twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gspo_megatron.data.conversation import encode_continuation, encode_opening, encode_turn
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer
from tests.places import ROOT
from tools.make_agent_tokenizer import make

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
DIRECTORY = ROOT / "recipes" / "tokenizers" / "agent"
TOKENIZER = HuggingFaceTokenizer(DIRECTORY)
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12)
CALLS = st.lists(
    WORDS.map(lambda word: {"type": "function", "function": {"name": "calculate", "arguments": {"expression": word}}}),
    min_size=1, max_size=2,
)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question, then turns of the model with answers of tools or of the user between them."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(WORDS)}]
    for _ in range(draw(st.integers(0, 3))):
        calls = draw(st.none() | CALLS)
        messages.append({"role": "assistant", "content": draw(WORDS), **({"tool_calls": calls} if calls else {})})
        messages += [{"role": "tool", "content": draw(WORDS)} for _ in calls or ()]
        if not calls:
            messages.append({"role": "user", "content": draw(WORDS)})
    return messages


def grow(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The ids that a session has after these messages, turn by turn."""
    opened = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    ids = encode_opening(TOKENIZER, messages[:opened], None)
    while opened < len(messages):
        turn = encode_turn(TOKENIZER, messages[opened])
        end = opened + 1
        while end < len(messages) and messages[end]["role"] != "assistant":
            end += 1
        ids += [*turn, *encode_continuation(TOKENIZER, messages[opened + 1 : end], turn[-1])]
        opened = end
    return ids


@CASES
@given(conversations())
def test_turn_by_turn_gives_what_the_template_gives_at_once(messages: list[dict[str, Any]]) -> None:
    assert grow(messages) == encode_opening(TOKENIZER, messages, None)


def test_a_turn_that_was_cut_is_ended() -> None:
    whole = encode_continuation(TOKENIZER, [{"role": "user", "content": "x"}], 45)
    stopped = encode_continuation(TOKENIZER, [{"role": "user", "content": "x"}], TOKENIZER.stop_ids[0])
    assert whole == [TOKENIZER.stop_ids[0], *stopped]


def test_what_a_template_raises_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="the chat template refuses the messages: "):
        encode_opening(TOKENIZER, [{"role": "user", "content": 5}], None)


def test_the_committed_tokenizer_is_what_its_tool_makes() -> None:
    assert make().to_str() == Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).to_str()
    assert TOKENIZER.vocab_size == 116
