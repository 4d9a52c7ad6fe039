"""Responses of several parts: turns with an environment, and thinking that is closed at its budget.

What is put in between is appended as ids and masked; the next request starts from all that is there. Everything is
decided from the generation alone, so that it continues the same wherever it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gspo_megatron.config.loading import refuse
from gspo_megatron.config.long_responses import ThinkingBudget
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.controller.scheduler import TRAINING, Scheduler
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import StopReason


@dataclass(frozen=True, slots=True)
class Thinking:
    """A limit of thinking, in ids."""

    budget: int
    """Tokens of a turn after which it is closed."""
    end_id: int
    """What closes it; a turn that has it, or a prompt, is not thinking."""
    closing: tuple[int, ...]
    """What is put in behind the budget; holds `end_id`."""

    def left(self, generation: Generation) -> int | None:
        """Tokens that a generation may still think; None when it does not think any more."""
        start = generation.turn_start
        if self.end_id in generation.token_ids[start:] or (not start and self.end_id in generation.prompt.token_ids):
            return None
        return max(0, self.budget - (len(generation) - start))


def make_thinking(section: ThinkingBudget | None, tokenizer: Tokenizer) -> Thinking | None:
    """The limit of a recipe, if it has one. Raises RecipeError where its words do not end the thinking."""
    if section is None:
        return None
    try:
        end, closing = tokenizer.encode_text(section.end), tokenizer.encode_text(section.closing)
    except ValueError as error:
        raise refuse("closing-not-writable", "rollout.thinking.closing", str(error), "choose other words") from None
    if len(end) != 1:
        raise refuse(
            "thinking-end-not-a-token", "rollout.thinking.end", f"{section.end!r} is {len(end)} tokens", "name one"
        )
    if end[0] not in closing:
        raise refuse(
            "closing-without-end", "rollout.thinking.closing", f"{section.closing!r} does not hold {section.end!r}",
            "add it: the answer would count as thinking for ever",
        )  # fmt: skip
    return Thinking(section.budget, end[0], tuple(closing))


class MultiTurnScheduler(Scheduler):
    """A scheduler of responses with several turns."""

    def __init__(
        self,
        servers: ServerSet,
        version: Callable[[], int | None],
        thinking: Thinking | None,
        environment: EnvironmentPool | None,
    ) -> None:
        """
        Args:
            servers: as `Scheduler`.
            version: as `Scheduler`.
            thinking: how long a turn may think; None = to its end.
            environment: replies to turns; None = a response has one turn.
        """
        super().__init__(servers, version)
        self._thinking, self._environment = thinking, environment

    async def complete(self, generation: Generation, sampling: Sampling, kind: int = TRAINING) -> StopReason:
        """As `Scheduler.complete`, through all turns; one with a call too many, or without a reply, is cut."""
        limit = min(sampling.max_tokens, sampling.max_tokens if generation.limit is None else generation.limit)
        stretch = replace(
            sampling, stop_ids=(*sampling.stop_ids, *(self._environment.call_ids if self._environment else ()))
        )
        with self.staying(generation.prompt.index):
            while True:
                if self._environment is not None and self._environment.replies_to(generation, sampling.stop_ids):
                    if (reason := await self._observe(self._environment, generation, limit)) is not None:
                        return reason
                    continue
                if generation.last_sampled in sampling.stop_ids:
                    return "stop"
                if len(generation) >= limit:
                    return await self._cut(generation)
                left = self._thinking.left(generation) if self._thinking is not None else None
                if self._thinking is not None and left == 0:
                    generation.put_in(self._thinking.closing[: limit - len(generation)], "closing")
                    continue
                until = limit if left is None else min(limit, len(generation) + left)
                reason = await super().complete(generation, replace(stretch, max_tokens=until), kind)
                asked = self._environment is not None and self._environment.replies_to(generation, sampling.stop_ids)
                if not (reason == "stop" and asked) and not (reason == "length" and until < limit):
                    return await self._cut(generation) if reason == "length" else reason

    async def _cut(self, generation: Generation) -> StopReason:
        """End a response at its limit. An environment that judges turns is shown the one that was cut: else the
        response would be scored by something else than those that it is compared with."""
        environment = self._environment
        if environment is None or not environment.replies_always or len(generation) == generation.turn_start:
            return "length"
        if generation.calls < environment.max_calls:
            reply = await environment.step(generation)
            generation.outcome = reply if isinstance(reply, Lost) else reply.reward
        return "length"

    async def _observe(self, environment: EnvironmentPool, generation: Generation, limit: int) -> StopReason | None:
        """Append the environment's reply to the last turn, up to the limit; why the response ends, if it does."""
        # A call that fills the response has no use for its reply; a turn that is judged by the environment has.
        if generation.calls == environment.max_calls or (len(generation) >= limit and not environment.replies_always):
            return "length"
        reply = await environment.step(generation)
        if isinstance(reply, Lost):
            generation.outcome = reply
            return "length"
        generation.outcome = reply.reward
        if reply.done:
            return "stop"  # the state stays: a checkpoint taken before the score asks once more
        generation.state = reply.state
        generation.put_in(reply.token_ids[: limit - len(generation)], "observation")
        return None
