"""Sections for long responses (repetition halt, thinking budget, length stages) and for environments."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.hooks import check_choice, is_reference
from gspo_megatron.config.recipe_paths import ObjectReference

BUILT_IN_ENVIRONMENTS = ("calculator",)
"""Values of `environment.name` beside a user's own."""
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

    name: ObjectReference
    """Which environment. `calculator` = arithmetic, evaluated in a separate process without files or network; or a
    class of your own by `file.py:NAME` or `package.module:NAME`, which replies to every turn until it says `done`."""
    max_turns: int = Field(default=8, gt=0)
    """Most replies per response; the next turn that asks for one ends it as truncated. Source: chosen here."""
    seconds: float = Field(default=10, gt=0)
    """Processor time of one reply, and 20 times that by the clock; a reply that takes longer cuts the response.
    Source: chosen here."""
    call_start: str = "<tool_call>"
    """The call is the text after the last occurrence in a turn; empty = the whole turn. Source: Qwen3."""
    call_end: str | None = None
    """Text that ends a call and the turn; must be one token. null = `</tool_call>` for the calculator; for your own
    class only stop tokens end turns. Source: Qwen3."""
    reply: str = "\n<tool_response>\n{result}\n</tool_response>\n"
    """Text appended after a call, with `{result}` replaced. Source: Qwen3, within the assistant's turn."""

    @property
    def is_own(self) -> bool:
        """Whether the environment is the user's own class."""
        return is_reference(self.name)

    @model_validator(mode="before")
    @classmethod
    def call_end_is_filled_in(cls, values: Any) -> Any:
        """A checked recipe says what ends a call."""
        if not isinstance(values, dict) or values.get("call_end") is not None or is_reference(str(values.get("name"))):
            return values
        return {**values, "call_end": "</tool_call>"}

    @model_validator(mode="after")
    def own_environments_write_their_replies(self) -> EnvironmentSection:
        if self.is_own and {"reply", "call_start"} & self.model_fields_set:
            defaults = (type(self).model_fields[key].default for key in ("reply", "call_start"))
            if (self.reply, self.call_start) != tuple(defaults):
                raise ValueError("reply and call_start are the calculator's; your own class returns what is appended")
        return self

    @field_validator("name")
    @classmethod
    def name_is_known(cls, name: str) -> str:
        return check_choice(name, BUILT_IN_ENVIRONMENTS)
