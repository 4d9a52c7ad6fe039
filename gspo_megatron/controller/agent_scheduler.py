"""Responses that an agent makes: it runs beside the controller and sends requests, each of which is one turn."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.agent_session import AgentTokenizer, EpisodeLimits, Session
from gspo_megatron.controller.chat_format import MODEL
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.multi_turn import MultiTurnScheduler, Thinking
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.controller.scheduler import TRAINING
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.transport.auth import is_same_key
from gspo_megatron.types import StopReason

LOOK_SECONDS = 1.0
"""How often the clock of an agent is looked at."""
MEASURES = {"turns": "agent_turns", "branches": "agent_branches", "rerendered": "agent_rerendered_turns",
            "malformed": "agent_malformed_calls", "retokenized": "tokens_retokenized"}  # fmt: skip
"""Counter -> metric."""


class Programs(Protocol):
    """What runs agents: `AgentPool`."""

    def start(self) -> None: ...
    def run(self, problem: dict[str, Any], client: ClientSettings) -> Future[Any]: ...
    def cancel(self, future: Future[Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Agents:
    """The agent of a run."""

    programs: Programs
    """Run its episodes."""
    tokenizer: AgentTokenizer
    """Writes messages."""


class AgentScheduler(MultiTurnScheduler):
    """A scheduler of responses that agents make."""

    def __init__(
        self,
        servers: ServerSet,
        version: Callable[[], int | None],
        thinking: Thinking | None,
        recipe: Recipe,
        agents: Agents,
    ) -> None:
        """
        Args:
            servers: as `Scheduler`.
            version: as `Scheduler`.
            thinking: how long a turn may think; None = to its end.
            recipe: its `agent` is set.
            agents: of the run.
        """
        super().__init__(servers, version, thinking, None)
        assert recipe.agent is not None
        self._section, self.programs, self._tokenizer = recipe.agent, agents.programs, agents.tokenizer
        self._lowest = recipe.reward.bounds[0]
        self._limits = EpisodeLimits(recipe.rollout.max_prompt_tokens, recipe.agent.max_turns)
        self.base_url = ""
        """Of the endpoint, as soon as it listens."""
        self._sessions: dict[Generation, asyncio.Task[StopReason]] = {}
        self._by_key: dict[str, Session] = {}
        self._stopped, self._going = asyncio.Event(), asyncio.Event()
        self._going.set()
        self._counts: Counter[str] = Counter()

    def session(self, key: str) -> Session | None:
        """The episode of a client's key."""
        return next((one for own, one in self._by_key.items() if is_same_key(own, key)), None)

    def measure(self) -> dict[str, float]:
        """Metrics of the training episodes since the last call: sums, and turns as a mean of the ended ones."""
        ended = self._counts.pop("ended", 0)
        found = {metric: float(self._counts[name]) for name, metric in MEASURES.items()}
        self._counts.clear()
        return found | {"agent_turns": found["agent_turns"] / max(ended, 1)}

    async def complete(self, generation: Generation, sampling: Sampling, kind: int = TRAINING) -> StopReason:
        """As `Scheduler.complete`: one episode. An interrupted one waits, and the next call goes on with it."""
        if generation not in self._sessions:
            self._sessions[generation] = asyncio.create_task(self._run(generation, sampling, kind))
        episode = self._sessions[generation]
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({episode, stopped} if kind == TRAINING else {episode}, return_when="FIRST_COMPLETED")
            if not episode.done():
                return "abort"
            del self._sessions[generation]
            return episode.result()
        except asyncio.CancelledError:
            self.forget(generation)
            raise
        finally:
            stopped.cancel()

    def forget(self, generation: Generation) -> None:
        """End the episode of a response that is not wanted any more."""
        if (episode := self._sessions.pop(generation, None)) is not None:
            episode.cancel()

    def resume(self) -> None:
        """Let training episodes go on after `interrupt`."""
        super().resume()
        self._stopped.clear()
        self._going.set()

    async def interrupt(self) -> None:
        """As `Scheduler.interrupt`; the agents wait for their answers meanwhile."""
        self._going.clear()
        self._stopped.set()
        await super().interrupt()

    async def close(self) -> None:
        """End all episodes."""
        episodes = [*self._sessions.values()]
        for generation in [*self._sessions]:
            self.forget(generation)
        await asyncio.gather(*episodes, return_exceptions=True)
        self.programs.close()

    async def _run(self, generation: Generation, sampling: Sampling, kind: int) -> StopReason:
        """One episode from its start to the end of the agent."""
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def sample(generation: Generation, sampling: Sampling) -> StopReason:
            try:
                return await self._sample(generation, sampling, kind)
            except Refused as error:
                if not failed.done():
                    failed.set_exception(error)
                raise

        counts = self._counts if kind == TRAINING else Counter[str]()
        session = Session(generation, sampling, self._tokenizer, self._limits, sample, counts)
        key = secrets.token_urlsafe(24)
        self._by_key[key] = session
        job = self.programs.run(generation.prompt.problem.line, ClientSettings(self.base_url, key, MODEL))
        try:
            outcome = await self._watch(session, asyncio.wrap_future(job), failed)
        finally:
            del self._by_key[key]
            self.programs.cancel(job)
        counts.update(ended=1, turns=session.turns)
        return self._end(session, outcome)

    async def _watch(self, session: Session, job: asyncio.Future[Any], failed: asyncio.Future[None]) -> Any:
        """What the agent returned, or a `Lost`. Raises Refused where no turn can be sampled any more."""
        limit = self._section.seconds
        while True:
            left = limit if session.pending else limit - session.spent()
            await asyncio.wait({job, failed}, timeout=min(LOOK_SECONDS, max(left, 0.01)), return_when="FIRST_COMPLETED")
            if failed.done():
                failed.result()
            if job.done():
                return job.result()
            if session.spent() > limit:
                return Lost("out-of-time", f"the agent took more than agent.seconds={limit:g} beside its requests")

    def _end(self, session: Session, outcome: Any) -> StopReason:
        """Why the response ended, and what its score is made of."""
        generation = session.generation
        if not session.turns and not isinstance(outcome, Lost):
            outcome = Lost("silent", "the agent returned without a request that was answered")
        # A client whose request is refused raises; for the agent that is the end of the room, not a fault of its own.
        # It has not come to its score. The reward's would be another than that of the others in the group.
        if session.is_full and isinstance(outcome, Lost) and outcome.kind == "raised" and session.turns:
            outcome = self._lowest
        generation.outcome = outcome
        return "length" if session.is_full or not session.turns else session.reason

    async def _sample(self, generation: Generation, sampling: Sampling, kind: int) -> StopReason:
        """One turn to its end; an interrupted one goes on when training does."""
        while True:
            if kind == TRAINING:
                await self._going.wait()
            reason = await super().complete(generation, sampling, kind)
            if reason != "abort":
                return reason
