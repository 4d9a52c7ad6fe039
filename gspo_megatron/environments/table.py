"""Names of environments, and how one is made from a recipe and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.environments.calculator import Calculator
from gspo_megatron.environments.environment import Environment, Step, TokenCodec, Turn
from gspo_megatron.types import Problem

ENVIRONMENTS: dict[str, Callable[[EnvironmentSection, TokenCodec], Environment]] = {"calculator": Calculator}
"""Names that `environment.name` may hold."""


def make_step(section: EnvironmentSection, tokenizer: TokenCodec) -> Step:
    """One function of the environment that a recipe names, for a process that holds no episode."""
    environment = ENVIRONMENTS[section.name](section, tokenizer)

    def step(problem: Problem, state: Any, action: Sequence[int]) -> Turn:
        return environment.step(environment.reset(problem) if state is None else state, action)

    return step


def read_call_ids(section: EnvironmentSection, tokenizer: TokenCodec) -> tuple[int, ...]:
    """Ids that end a call. Raises RecipeError where the tokenizer has no single token for it, or cannot say a reply."""
    ids = tokenizer.encode_text(section.call_end)
    if len(ids) != 1:
        raise refuse(
            "call-end-not-a-token", "environment.call_end", f"{section.call_end!r} is {len(ids)} tokens", "name one"
        )
    ENVIRONMENTS[section.name](section, tokenizer)
    return tuple(ids)
