"""Sections for long responses (repetition halt, thinking budget, length stages) and for environments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section

BUDGET_WORDS = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>.\n\n"
)


class RepetitionHalt(Section):
    """`rollout.repetition_halt`: end a response that repeats one pattern of tokens."""

    longest_pattern: int = Field(default=64, gt=0)
    """Tokens of the longest pattern that is searched for; so are all shorter ones. Source: chosen here: a few lines."""
    times: int = Field(default=16, ge=2)
    """Consecutive repetitions at the end of a response that halt it. Source: chosen here: no proof needs 16."""


class ThinkingBudget(Section):
    """`rollout.thinking`: close thinking that exceeds a budget; the response continues after it."""

    budget: int = Field(gt=0)
    """Most tokens of thinking, counted from the start of the response (of the turn, with an environment)."""
    end: str = "</think>"
    """Text that closes the thinking; must be one token. Source: Qwen3."""
    closing: str = BUDGET_WORDS
    """Text appended when the budget is used up; contains `end`; not trained on.

    Source: Qwen3 technical report, arXiv 2505.09388.
    """


class LengthStage(Section):
    """`rollout.length_stages`: one stage with a shorter response limit."""

    until_step: int = Field(gt=0)
    """Last step of the stage."""
    max_answer_tokens: int = Field(gt=0)
    """Longest response to a prompt that is started in the stage, tokens, stop token included."""


class EnvironmentSection(Section):
    """`environment`: the tool that replies to the model between its turns.

    Its tokens are appended as ids and not trained on. All turns of a response, replies included, share
    `rollout.max_answer_tokens`.
    """

    name: Literal["calculator"]
    """Which environment. `calculator` = arithmetic, evaluated in a separate process without files or network."""
    max_turns: int = Field(default=8, gt=0)
    """Most calls per response; the next call ends it as truncated. Source: chosen here."""
    call_start: str = "<tool_call>"
    """The call is the text after the last occurrence in a turn; empty = the whole turn. Source: Qwen3."""
    call_end: str = "</tool_call>"
    """Text that ends a call and the turn; must be one token. Source: Qwen3."""
    reply: str = "\n<tool_response>\n{result}\n</tool_response>\n"
    """Text appended after a call, with `{result}` replaced. Source: Qwen3, within the assistant's turn."""
