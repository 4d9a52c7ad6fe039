"""The table of environments, and how one is made from a recipe and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.environments.calculator import Calculator
from gspo_megatron.environments.environment import Environment, MessageEncoder, Step, TokenCodec, Turn
from gspo_megatron.environments.own_environment import OwnEnvironment
from gspo_megatron.types import Problem

ENVIRONMENTS: dict[str, Callable[[EnvironmentSection, TokenCodec], Environment]] = {"calculator": Calculator}
"""The built-in values of `environment.name`."""


def make_step(section: EnvironmentSection, tokenizer: TokenCodec, encode_messages: MessageEncoder) -> Step:
    """Make the step function of the environment that a recipe names. It keeps no state between calls.

    Raises:
        RecipeError: the environment cannot be loaded, or the tokenizer cannot write its reply.
    """
    if section.is_own:
        environment: Environment = OwnEnvironment(section.name, tokenizer, encode_messages)
    else:
        environment = ENVIRONMENTS[section.name](section, tokenizer)

    def step(problem: Problem, state: Any, action: Sequence[int]) -> Turn:
        return environment.step(environment.reset(problem) if state is None else state, action)

    return step


def read_call_ids(section: EnvironmentSection, tokenizer: TokenCodec) -> tuple[int, ...]:
    """Return the ids that end a call; none where only stop ids end turns.

    Raises:
        RecipeError: `call_end` is not one token, or the tokenizer cannot write a reply.
    """
    if not section.is_own:
        ENVIRONMENTS[section.name](section, tokenizer)
    if section.call_end is None:
        return ()
    ids = tokenizer.encode_text(section.call_end)
    if len(ids) != 1:
        raise refuse(
            "call-end-not-a-token",
            "environment.call_end",
            f"{section.call_end!r} is {len(ids)} tokens",
            "set it to the text of one token",
        )
    return tuple(ids)
