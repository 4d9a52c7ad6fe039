"""An environment in processes of its own: one that hangs or dies costs an answer, not the run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import ProcessPool
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.environments import Step, Turn, make_step, read_call_ids

SECONDS = 10.0
"""Time limit of one reply."""


@dataclass(frozen=True, slots=True)
class Calls:
    """An environment, as an answer meets it."""

    ids: tuple[int, ...]
    """Each ends a turn that is a call."""
    most: int
    """Calls that an answer may make."""
    pool: ProcessPool
    """Asks it; see `environments.Step`."""

    async def ask(self, generation: Generation) -> Turn | str:
        """What the environment says to the last turn of a draft, or a sentence about why it says nothing."""
        action = generation.token_ids[generation.turn_start :].tolist()
        return await asyncio.wrap_future(self.pool.ask(generation.prompt.problem, generation.state, action))


def make_calls(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> Calls | None:
    """The environment of a recipe, if it has one. Raises RecipeError where the tokenizer does not fit it."""
    section = recipe.environment
    if section is None:
        return None
    make: Callable[[], Step] = functools.partial(_make_step, recipe)
    pool = ProcessPool(make, workers, SECONDS, "environment")
    return Calls(read_call_ids(section, tokenizer), section.max_turns, pool)


def _make_step(recipe: Recipe) -> Step:
    """Within a process of the pool, which has a tokenizer of its own."""
    assert recipe.environment is not None
    return make_step(recipe.environment, load_tokenizer(recipe.tokenizer, recipe.model.path))
