"""The section `reward.judge`: the model that a reward of the user's own asks."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import Field, field_validator

from gspo_megatron.config.model_server import ModelServerSection

PARAMETER = "judge"
"""Name of the parameter by which a reward asks for the judge."""
RESERVED = ("model", "messages", "stream", "n")
"""Fields of a request that are not options."""


class JudgeSection(ModelServerSection):
    """`reward.judge`: a model behind an OpenAI-style URL, which a reward with a parameter `judge` asks.

    It is reached directly, without a proxy of the site.
    """

    options: dict[str, Any] = Field(default_factory=dict)
    """Other fields of each request, passed unchanged: `{temperature: 0, max_tokens: 512}`. Empty = the server's own."""
    prompt_price: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens, in any currency: the metric `reward/_judge_cost`."""
    answer_price: float = Field(default=0.0, ge=0)
    """Price of a million tokens of the judge's answers."""

    @field_validator("options")
    @classmethod
    def options_are_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in options if name in RESERVED]:
            raise ValueError(f"options holds {taken[0]}, which each request sets itself; remove it")
        return options


def asks_judge(reward: Any) -> bool:
    """Whether a reward has a parameter for the judge."""
    try:
        return PARAMETER in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False
