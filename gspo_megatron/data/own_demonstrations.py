"""A user's own demonstrations: JSONL lines of messages as fine-tuning samples. The assistant's turns are trained on.

A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, with `tools`
for the chat template where it has any. System, user and tool messages are context: masked, and without a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gspo_megatron.config.loading import RecipeError, refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.demonstrations import encode_messages
from gspo_megatron.data.json_lines import broken_line, read_objects
from gspo_megatron.data.prompt_writer import PromptWriter
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from gspo_megatron.types import Finding, Problem, Sample, SampleRef

KEY = "cold_start.path"
ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_FINDINGS = 5


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One line of the file."""

    where: str
    """`FILE line N`."""
    messages: list[dict[str, Any]]
    """In OpenAI's format; the last is the assistant's."""
    tools: list[Any] | None
    """For the chat template."""
    fields: dict[str, Any]
    """The line."""

    @property
    def questions(self) -> list[str]:
        """What its user asks."""
        return [message["content"] for message in self.messages if message["role"] == "user"]


@dataclass(slots=True)
class EncodedDemonstrations:
    """What became of the lines."""

    samples: list[Sample] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    """Lines that cannot be trained on: errors."""
    too_long: list[str] = field(default_factory=list)
    """Places of lines that are left out because they have more tokens than the model is given."""
    held_out: list[str] = field(default_factory=list)
    """Places of lines that are left out because they answer a held-out question."""

    def findings(self, longest: int) -> list[Finding]:
        """All that is to be said of them; without an error they can be trained on.

        Args:
            longest: tokens of the longest one.
        """
        if self.faults:
            return self.faults[:MOST_FINDINGS]
        fix = "raise rollout.max_answer_tokens or max_prompt_tokens, or shorten them"
        if not self.samples and self.too_long:
            message = f"all {len(self.too_long)} demonstrations have more than {longest} tokens ({self.too_long[0]})"
            return [Finding("demonstrations-too-long", "error", KEY, message, fix)]
        if not self.samples:
            message = f"every demonstration answers a held-out question ({self.held_out[0]})"
            return [Finding("demonstrations-held-out", "error", KEY, message, "hold out other questions")]
        found = []
        if self.too_long:
            message = f"{len(self.too_long)} demonstrations of more than {longest} tokens are left out"
            found.append(Finding("demonstrations-too-long", "warning", KEY, f"{message} ({self.too_long[0]})", fix))
        if self.held_out:
            message = f"{len(self.held_out)} demonstrations answer a held-out question and are left out"
            fix = "nothing to do, or remove them from the file"
            found.append(Finding("demonstrations-held-out", "warning", KEY, f"{message} ({self.held_out[0]})", fix))
        return found


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Read every line. Raises RecipeError with file, line and fault."""
    found = [make_demonstration(line, where) for where, line in read_objects(path, KEY)]
    if not found:
        fix = "write one object with `messages` per line"
        raise refuse("demonstrations-empty", KEY, f"{path} holds no demonstration", fix)
    return found


def make_demonstration(line: dict[str, Any], where: str) -> Demonstration:
    """Make the demonstration of a line. Raises RecipeError."""
    messages, tools = line.get("messages"), line.get("tools")
    if not (isinstance(messages, list) and messages):
        has = ", ".join(line) or "nothing"
        raise broken_line(KEY, where, f"has no list `messages` (it has {has})", "write role and content of each turn")
    for number, message in enumerate(messages, 1):
        if fault := _message_fault(message):
            raise broken_line(KEY, where, f"message {number} {fault}", "write role and content as OpenAI's format has")
    if tools is not None and not isinstance(tools, list):
        raise broken_line(KEY, where, "has `tools` that are no list", "write the list of OpenAI's format, or none")
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" or roles[-1] != "assistant":
        fault = f"goes from {roles[0]} to {roles[-1]}: the assistant must answer something, and have the last turn"
        raise broken_line(KEY, where, fault, "add the missing turn, or cut what follows the last answer")
    if ("assistant", "assistant") in pairwise(roles):
        fault = "has two turns of the assistant in a row, which no template separates"
        raise broken_line(KEY, where, fault, "join them, or write what came between")
    return Demonstration(where, messages, tools, line)


def _message_fault(message: object) -> str | None:
    """Why this is no message; None = it is one."""
    if not isinstance(message, dict):
        return "is no object"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"has `role`={role!r}, not one of {', '.join(ROLES)}"
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        return "has `tool_calls` that are no list of the assistant's"
    if calls and not all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls):
        return "has `tool_calls` without `function`"
    if not (isinstance(content, str) or (content is None and calls)):
        return f"has `content`={str(content)[:40]!r}, which is no text"
    return None


def encode_demonstrations(
    recipe: Recipe, tokenizer: Tokenizer, holds_out: Callable[[str], bool], most: int | None = None
) -> EncodedDemonstrations:
    """Read and encode the lines of `cold_start.path`.

    Args:
        recipe: names the file, the system prompt and the limits.
        tokenizer: of the recipe.
        holds_out: whether a question is held out.
        most: lines to look at, more only as long as none of them can be trained on; None = all.

    Raises:
        RecipeError: a line that is no demonstration, with file, line and fault.
    """
    assert recipe.cold_start is not None and recipe.cold_start.path is not None
    found, longest = EncodedDemonstrations(), recipe.rollout.max_sequence_tokens
    writer = PromptWriter(recipe.tokenizer, tokenizer)
    for number, line in enumerate(read_demonstrations(recipe.cold_start.path)):
        if most is not None and number >= most and found.samples:
            break
        if any(map(holds_out, line.questions)):
            found.held_out.append(line.where)
            continue
        try:
            prompt, answer, trained = _encode(line, tokenizer, writer)
        except ValueError as error:
            fix = "correct the line, or name another tokenizer"
            found.faults.append(Finding("demonstration-does-not-fit", "error", KEY, f"{line.where}: {error}", fix))
            continue
        ids = np.array([*prompt, *answer], dtype=np.int32)
        if ids.max() >= recipe.arch.vocab_size:
            message = f"{line.where} has token id {ids.max()}, and the model vocab_size={recipe.arch.vocab_size} rows"
            fix = "name the model's own tokenizer"
            found.faults.append(Finding("demonstration-beyond-vocabulary", "error", KEY, message, fix))
        elif len(ids) > longest:
            found.too_long.append(line.where)
        else:
            ref = SampleRef("", number, 0, len(prompt), len(answer), 1.0, "stop", segments=())
            mask = np.array([False] * len(prompt) + trained)
            found.samples.append(Sample(ids, mask, np.zeros(len(ids), dtype=np.float32), ref))
    return found


def draw_demonstrations(
    recipe: Recipe, tokenizer: Tokenizer, holds_out: Callable[[str], bool], count: int
) -> tuple[list[Sample], list[Finding]]:
    """Samples for fine-tuning, shuffled again for every pass over the file, and warnings.

    Args:
        recipe, tokenizer, holds_out: as in `encode_demonstrations`.
        count: samples.

    Raises:
        RecipeError: as `encode_demonstrations`; a line that cannot be trained on.
    """
    encoded = encode_demonstrations(recipe, tokenizer, holds_out)
    findings = encoded.findings(recipe.rollout.max_sequence_tokens)
    if any(finding.severity == "error" for finding in findings):
        raise RecipeError(findings)
    drawn: list[Sample] = []
    while len(drawn) < count:
        order = list(encoded.samples)
        random.Random(f"cold_start/{recipe.run.seed}/{len(drawn)}").shuffle(order)
        drawn += order
    return drawn[:count], findings


def _encode(line: Demonstration, tokenizer: Tokenizer, writer: PromptWriter) -> tuple[list[int], list[int], list[bool]]:
    """Ids of what comes before the first turn of the assistant, ids of the rest, and which of those are trained.

    The first are written as the prompt of a problem with these messages is.

    Raises:
        ValueError: the tokenizer, its template or a user's rendering cannot write it.
    """
    roles = [message["role"] for message in line.messages]
    first = roles.index("assistant")
    opening, rest = line.messages[:first], line.messages[first:]
    is_plain = roles[:first] == ["user"] and not line.tools
    if not isinstance(tokenizer, HuggingFaceTokenizer) and not (is_plain and len(rest) == 1 and rest[0]["content"]):
        raise ValueError("tokenizer.kind=sentencepiece writes one question and one answer, and nothing else")
    asked = Problem(
        "", opening[-1]["content"], line.fields,
        messages=() if is_plain else tuple(opening), tools=tuple(line.tools or ()),
    )  # fmt: skip
    prompt = writer.encode(asked)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return prompt, *encode_messages(tokenizer, rest)
    answer = tokenizer.encode_response(rest[0]["content"])
    return prompt, answer, [True] * len(answer)
