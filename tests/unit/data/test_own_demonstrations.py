"""A user's own demonstrations: lines, masks, what is refused with file and line, what is left out and counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config import Recipe
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.data.own_demonstrations import (
    draw_demonstrations,
    encode_demonstrations,
    make_demonstration,
)
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.trainer.cold_start import cache_key
from tests.places import ROOT

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
CHAT = HuggingFaceTokenizer(ROOT / "recipes" / "tokenizers" / "agent")
PIECES = SentencePieceTokenizer(ROOT / "recipes" / "tokenizers" / "arithmetic.model")
QUESTION, ANSWER = {"role": "user", "content": "Calculate 1 + 2."}, {"role": "assistant", "content": "3"}
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "calculate", "arguments": '{"expression": "1 + 2"}'}}],
}  # fmt: skip
REPLY = {"role": "tool", "content": "3"}


def never(question: str) -> bool:
    return False


def recipe_of(directory: Path, *lines: object, chat: bool = True, overrides: tuple[str, ...] = ()) -> Recipe:
    """The tiny recipe with these demonstrations."""
    file = directory / "own.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    tokenizer = ["tokenizer.kind=huggingface", f"tokenizer.path={ROOT}/recipes/tokenizers/agent"] if chat else []
    rows = [f"model.architecture.vocab_size={CHAT.vocab_size}"] if chat else []
    rollout = ["rollout.max_prompt_tokens=64", "rollout.max_answer_tokens=64"]
    source = ["cold_start.demonstrations=null", f"cold_start.path={file}", "cold_start.worked_fraction=1"]
    return load_recipe(ROOT / "recipes" / "tiny_moe.yaml", [*tokenizer, *rows, *rollout, *source, *overrides])


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def encoded(recipe: Recipe, tokenizer: Tokenizer = CHAT) -> list[tuple[str, str]]:
    """Text of each sample, and that of its trained tokens, stop ids as `/`."""
    found = encode_demonstrations(recipe, tokenizer, never)
    assert not found.findings(recipe.rollout.max_sequence_tokens)

    def text(ids: np.ndarray) -> str:
        return "".join("/" if i in tokenizer.stop_ids else tokenizer.decode([i]) for i in ids.tolist())

    return [(text(sample.token_ids), text(sample.token_ids[sample.loss_mask])) for sample in found.samples]


def test_the_assistant_s_turns_are_trained_with_their_ends(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), turns(QUESTION, CALL, REPLY, ANSWER, QUESTION, ANSWER))
    (_, one), (whole, several) = encoded(recipe)
    assert one == "3/"
    assert several.endswith("</tool_call>/3/3/") and several.startswith("<tool_call>")
    assert "<tool_response>" in whole and "<tool_response>" not in several


def test_the_opening_is_the_prompt_that_the_model_is_asked_with(tmp_path: Path) -> None:
    """A system prompt of the recipe's stands before a conversation without one."""
    for system in (None, "Add."):
        overrides = () if system is None else (f"tokenizer.system_prompt={system}",)
        recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), overrides=overrides)
        tokenizer = load_tokenizer(recipe.tokenizer, None)
        (sample,) = encode_demonstrations(recipe, tokenizer, never).samples
        prompt = tokenizer.encode_prompt(QUESTION["content"])
        assert sample.token_ids[: sample.ref.prompt_length].tolist() == prompt
        assert not sample.loss_mask[: len(prompt)].any() and sample.loss_mask[len(prompt) :].all()
    recipe = recipe_of(tmp_path, turns({"role": "system", "content": "Own."}, QUESTION, ANSWER), overrides=overrides)
    ((whole, _),) = encoded(recipe)
    assert "Own." in whole and "Add." not in whole


def test_a_rendering_of_one_s_own_writes_the_opening(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def render(line, chat):\n    return line['before'] + chat.messages[-1]['content'] + '<tool_call>'\n"
    )
    overrides = (f"tokenizer.rendering={tmp_path}/own.py:render",)
    recipe = recipe_of(tmp_path, {**turns(QUESTION, ANSWER), "before": "Now: "}, overrides=overrides)
    ((whole, trained),) = encoded(recipe)
    assert whole == "Now: Calculate 1 + 2.<tool_call>3/" and trained == "3/"


def test_a_template_that_begins_turns_in_two_ways_is_refused(tmp_path: Path) -> None:
    """As some that open the thinking themselves: the question before the turn must not be trained on."""
    source, directory = ROOT / "recipes" / "tokenizers" / "agent", tmp_path / "tokenizer"
    shutil.copytree(source, directory)
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text() + "{%- if add_generation_prompt %}{{ '<tool_call>' }}{% endif %}")
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER))
    (fault,) = encode_demonstrations(recipe, HuggingFaceTokenizer(directory), never).findings(128)
    assert "own.jsonl line 1: the chat template begins a written turn in another way" in fault.message


def test_without_a_template_a_line_is_a_question_and_an_answer(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), chat=False)
    ((_, trained),) = encoded(recipe, PIECES)
    assert trained == "3/"
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER, QUESTION, ANSWER), chat=False)
    (fault,) = encode_demonstrations(recipe, PIECES, never).findings(128)
    assert "own.jsonl line 1: tokenizer.kind=sentencepiece writes one question and one answer" in str(fault)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"),
        ({"prompt": "a", "answer": "b"}, "has no list `messages` (it has prompt, answer)"),
        (turns(), "has no list `messages`"),
        (turns(QUESTION), "goes from user to user"),
        (turns(ANSWER), "goes from assistant to assistant"),
        (turns(QUESTION, ANSWER, QUESTION), "goes from user to user"),
        (turns(QUESTION, ANSWER, ANSWER), "has two turns of the assistant in a row"),
        (turns(QUESTION, {"role": "bot", "content": "3"}), "message 2 has `role`='bot', not one of system"),
        (turns(QUESTION, {"role": "assistant"}), "message 2 has `content`='None', which is no text"),
        (turns(QUESTION, {"role": "assistant", "content": [{"text": "3"}]}), "message 2 has `content`="),
        (turns({**QUESTION, "tool_calls": []}, ANSWER), "message 1 has `tool_calls` that are no list of the assistant"),
        (turns(QUESTION, {**CALL, "tool_calls": [{"name": "f"}]}), "message 2 has `tool_calls` without `function`"),
        ({"messages": ["a", "b"]}, "message 1 is no object"),
        ({**turns(QUESTION, ANSWER), "tools": "none"}, "has `tools` that are no list"),
    ],
)
def test_a_broken_line_is_named(line: object, fault: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), line)
    with pytest.raises(RecipeError) as error:
        encode_demonstrations(recipe, CHAT, never)
    assert f"own.jsonl line 2 {fault}" in str(error.value) and "cold_start.path" in str(error.value)


def test_an_empty_and_a_missing_file_are_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "")
    with pytest.raises(RecipeError, match=r"own\.jsonl holds no demonstration"):
        encode_demonstrations(recipe, CHAT, never)
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"own\.jsonl cannot be read"):
        encode_demonstrations(recipe, CHAT, never)


def test_long_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    long = turns(QUESTION, {"role": "assistant", "content": "1" * 200})
    (warning,) = encode_demonstrations(recipe_of(tmp_path, turns(QUESTION, ANSWER), long), CHAT, never).findings(128)
    assert warning.severity == "warning" and "1 demonstrations of more than 128 tokens" in warning.message
    assert "own.jsonl line 2" in warning.message
    recipe = recipe_of(tmp_path, long, long)
    (error,) = encode_demonstrations(recipe, CHAT, never).findings(128)
    assert error.severity == "error" and "all 2 demonstrations have more than 128 tokens" in error.message
    with pytest.raises(RecipeError, match="all 2 demonstrations"):
        draw_demonstrations(recipe, CHAT, never, 4)


def test_ids_beyond_the_model_are_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), overrides=("model.architecture.vocab_size=20",))
    (fault,) = encode_demonstrations(recipe, CHAT, never).findings(128)
    assert "own.jsonl line 1 has token id" in fault.message and "vocab_size=20" in fault.message


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), chat=False)
    stream = PromptStream(recipe, PIECES)
    asked = {"role": "user", "content": stream.held_out(1)[0].problem.question}
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER), turns(asked, ANSWER), chat=False)
    found = encode_demonstrations(recipe, PIECES, stream.holds_out)
    assert len(found.samples) == 1 and found.held_out == [f"{tmp_path}/own.jsonl line 2"]
    (error,) = encode_demonstrations(
        recipe_of(tmp_path, turns(asked, ANSWER), chat=False), PIECES, stream.holds_out
    ).findings(128)
    assert error.severity == "error" and "every demonstration answers a held-out question" in error.message


def test_every_pass_has_every_line_once_in_another_order(tmp_path: Path) -> None:
    lines = [turns(QUESTION, {"role": "assistant", "content": str(n)}) for n in range(7)]
    recipe = recipe_of(tmp_path, *lines)
    drawn, _ = draw_demonstrations(recipe, CHAT, never, 21)
    passes = [[sample.ref.prompt_index for sample in drawn[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes) and passes[0] != passes[1]
    again, _ = draw_demonstrations(recipe, CHAT, never, 21)
    assert [sample.ref.prompt_index for sample in again] == [*passes[0], *passes[1], *passes[2]]


def test_a_plan_looks_at_the_first_lines_only(tmp_path: Path) -> None:
    lines = [turns(QUESTION, ANSWER)] * 30
    assert len(encode_demonstrations(recipe_of(tmp_path, *lines), CHAT, never, most=10).samples) == 10
    long = turns(QUESTION, {"role": "assistant", "content": "1" * 200})
    found = encode_demonstrations(recipe_of(tmp_path, *[long] * 20, turns(QUESTION, ANSWER)), CHAT, never, most=10)
    assert len(found.samples) == 1, "it looks on until one can be trained on"


def test_the_cache_knows_what_the_file_holds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, turns(QUESTION, ANSWER))
    before = cache_key(recipe)
    assert cache_key(recipe_of(tmp_path, turns(QUESTION, ANSWER))) == before
    assert cache_key(recipe_of(tmp_path, turns(QUESTION, ANSWER), turns(QUESTION, ANSWER))) != before


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["cold_start.path=x"], "both of demonstrations and path is set"),
        (["cold_start.demonstrations=null"], "neither of demonstrations and path is set"),
        (["cold_start.demonstrations=null", "cold_start.path=x"], "worked_fraction=0.42 is for a writer"),
    ],
)
def test_the_section_has_one_source(overrides: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        load_recipe(ROOT / "recipes" / "tiny_moe.yaml", overrides)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON,
        "content": st.text(max_size=5) | JSON,
        "tool_calls": JSON,
    },
)


@CASES
@given(st.fixed_dictionaries({}, optional={"messages": st.lists(MESSAGES | JSON, max_size=4) | JSON, "tools": JSON}))
def test_any_line_is_a_demonstration_or_a_sentence(line: dict[str, Any]) -> None:
    try:
        made = make_demonstration(line, "FILE line 1")
    except RecipeError as error:
        assert "FILE line 1" in str(error)
    else:
        assert made.messages[-1]["role"] == "assistant" and made.messages[0]["role"] != "assistant"
