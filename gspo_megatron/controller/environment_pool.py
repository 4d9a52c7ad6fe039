"""An environment in processes of its own: one that hangs or dies costs one response, not the run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import Lost, ProcessPool
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.environments import Step, Turn, make_step, read_call_ids

STEP_SECONDS = 10.0
"""Time limit of one reply."""


@dataclass(frozen=True, slots=True)
class EnvironmentPool:
    """The environment of a run and the processes in which it computes."""

    call_ids: tuple[int, ...]
    """Token ids that end a turn with a call to the environment."""
    max_calls: int
    """Most calls of one response."""
    processes: ProcessPool
    """Compute its steps; see `environments.Step`."""

    async def step(self, generation: Generation) -> Turn | str:
        """The environment's reply to the last turn of a generation, or a sentence why there is none."""
        action = generation.token_ids[generation.turn_start :].tolist()
        reply = await asyncio.wrap_future(self.processes.ask(generation.prompt.problem, generation.state, action))
        return reply.why if isinstance(reply, Lost) else reply


def make_environment_pool(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> EnvironmentPool | None:
    """The environment of a recipe, if it has one. Raises RecipeError where the tokenizer does not fit it."""
    section = recipe.environment
    if section is None:
        return None
    make: Callable[[], Step] = functools.partial(_make_step, recipe)
    pool = ProcessPool(make, workers, STEP_SECONDS, "environment")
    return EnvironmentPool(read_call_ids(section, tokenizer), section.max_turns, pool)


def _make_step(recipe: Recipe) -> Step:
    """Within a process of the pool, which has a tokenizer of its own."""
    assert recipe.environment is not None
    return make_step(recipe.environment, load_tokenizer(recipe.tokenizer, recipe.model.path))
