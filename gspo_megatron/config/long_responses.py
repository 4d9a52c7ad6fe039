"""What shortens the longest answers, and what an answer may ask between its tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section

BUDGET_WORDS = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>.\n\n"
)


class RepetitionHalt(Section):
    """`rollout.repetition_halt`: an answer ends where it has said the same thing so many times in a row."""

    longest_pattern: int = Field(default=64, gt=0)
    """Tokens of the longest pattern that is looked for; all shorter ones are too. Source: ours: a few lines of text."""
    times: int = Field(default=16, ge=2)
    """Times that a pattern stands at the end of an answer, one behind the other. Source: ours: no proof needs 16."""


class ThinkingBudget(Section):
    """`rollout.thinking`: thinking that goes on for too long is closed by force, and the answer goes on from there."""

    budget: int = Field(gt=0)
    """Tokens of thinking, counted from the start of the answer (of the turn, in an environment)."""
    end: str = "</think>"
    """What closes the thinking; must be one token. An answer that has it is not thinking any more. Source: Qwen3."""
    closing: str = BUDGET_WORDS
    """Put behind the budget's last token, `end` included; masked. Source: Qwen3 technical report, arXiv 2505.09388."""


class LengthStage(Section):
    """An entry of `rollout.length_stages`."""

    until_step: int = Field(gt=0)
    """Last step of the stage."""
    max_answer_tokens: int = Field(gt=0)
    """Longest answer to a prompt that is begun in it, stop token included."""


class EnvironmentSection(Section):
    """`environment`: what answers the model between its turns. Its words are masked; ids are appended, never rewritten.

    The turns of an answer share `rollout.max_answer_tokens`, the environment's words included.
    """

    name: Literal["calculator"]
    """`calculator` = arithmetic, in a process of its own without files or network."""
    max_turns: int = Field(default=8, gt=0)
    """Calls that an answer may make; one more cuts it. Source: ours."""
    call_start: str = "<tool_call>"
    """The text behind its last occurrence in a turn is the call; empty = all of the turn. Source: Qwen3."""
    call_end: str = "</tool_call>"
    """What ends a call and hands the turn over; must be one token. Source: Qwen3."""
    reply: str = "\n<tool_response>\n{result}\n</tool_response>\n"
    """What the model reads behind its call, `{result}` replaced. Source: Qwen3, within the assistant's turn."""
