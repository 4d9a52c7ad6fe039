"""An environment in processes of its own: one that hangs or dies costs one response, not the run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import Lost, ProcessPool
from gspo_megatron.data.conversation import ChatTokenizer, encode_continuation
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.environments import Step, Turn, make_step, read_call_ids


@dataclass(frozen=True, slots=True)
class EnvironmentPool:
    """The environment of a run and the processes in which it computes."""

    call_ids: tuple[int, ...]
    """Token ids that end a turn with a call to the environment."""
    max_calls: int
    """Most replies of one response."""
    processes: ProcessPool
    """Compute its steps; see `environments.Step`."""
    replies_always: bool = False
    """It replies to a turn that ended with a stop id too, and decides when the response ends."""

    def replies_to(self, generation: Generation, stop_ids: Sequence[int]) -> bool:
        """Whether the last turn is one that the environment replies to."""
        last = generation.last_sampled
        return last in self.call_ids or (self.replies_always and last in stop_ids)

    async def step(self, generation: Generation) -> Turn | Lost:
        """The environment's reply to the last turn of a generation, or why there is none."""
        action = generation.token_ids[generation.turn_start :].tolist()
        return await asyncio.wrap_future(self.processes.ask(generation.prompt.problem, generation.state, action))


def make_environment_pool(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> EnvironmentPool | None:
    """The environment of a recipe, if it has one. Raises RecipeError where it or the tokenizer does not fit."""
    section = recipe.environment
    if section is None:
        return None
    make: Callable[[], Step] = functools.partial(_make_step, recipe)
    if section.is_own:
        load_hook("environment", section.name)
    pool = ProcessPool(make, workers, section.seconds, "environment")
    return EnvironmentPool(read_call_ids(section, tokenizer), section.max_turns, pool, section.is_own)


def _make_step(recipe: Recipe) -> Step:
    """Within a process of the pool, which has a tokenizer of its own."""
    assert recipe.environment is not None
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)

    def encode_messages(messages: Sequence[Mapping[str, Any]], last_id: int) -> list[int]:
        if not hasattr(tokenizer, "render"):
            raise ValueError(
                f"tokenizer.kind={recipe.tokenizer.kind} has no chat template; reply with a text or with ids"
            )
        return encode_continuation(cast("ChatTokenizer", tokenizer), messages, last_id)

    return make_step(recipe.environment, tokenizer, encode_messages)
