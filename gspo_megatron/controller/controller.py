"""The controller: prompts to scored, stored, versioned answers, and the weight update.

The group buffer decides what is started when and which groups make a batch; the scheduler, which server samples what.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.batch_metrics import Progress, measure_answers, measure_staleness
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.group_buffer import GroupBuffer
from gspo_megatron.controller.groups import TokenCounter
from gspo_megatron.controller.multi_turn import MultiTurnScheduler, Thinking
from gspo_megatron.controller.scheduler import URGENT
from gspo_megatron.controller.scoring import ScoringPool
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.state import describe_groups, forget_lost_members, read_groups, store_generations
from gspo_megatron.controller.weight_update import Probe, WeightUpdater
from gspo_megatron.data.store import SampleStore
from gspo_megatron.types import Prompt, Response, SampleRef, StopReason

log = logging.getLogger(__name__)
NUM_EXAMPLES = 3
RECEIVED_TOKENS = "received_tokens"
"""File of the sample store."""
KEPT_STATES = 3
"""Checkpoints whose unfinished answers are kept; the trainer keeps fewer."""
NO_WEIGHTS = "no server has weights yet; send them with /weights/begin and /weights/finish first"


class Prompts(Protocol):
    """What the controller asks of a prompt stream."""

    skipped: Counter[str]

    def next(self, count: int) -> list[Prompt]: ...
    def held_out(self, count: int) -> list[Prompt]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class TextDecoder(Protocol):
    """What the controller asks of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer with its text and score."""

    question: str
    answer: Response
    text: str
    reward: float


class Controller:
    """One run's controller; its methods run one at a time."""

    def __init__(
        self,
        recipe: Recipe,
        servers: ServerSet,
        prompts: Prompts,
        tokenizer: TextDecoder,
        scoring: ScoringPool,
        store: SampleStore,
        host: str,
        overlaps: bool,
        sleeps: bool,
        thinking: Thinking | None = None,
        environment: EnvironmentPool | None = None,
    ) -> None:
        """
        Args:
            recipe: the run.
            servers: all servers of the run.
            prompts: where its prompts come from.
            tokenizer: turns answers into text for the scorer.
            scoring: scores them.
            store: keeps them.
            host: this controller's address as the trainer and the servers reach it.
            overlaps: the servers have devices of their own and go on while the trainer works.
            sleeps: servers and trainer take turns on the same devices.
            thinking: limit of the thinking within an answer.
            environment: the environment that replies between turns.
        """
        self.recipe = recipe
        self.servers = servers
        self.updater = WeightUpdater(servers, recipe.weight_update, host, sleeps)
        self.phase = "waiting for servers"
        self._progress = Progress()
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scoring = scoring
        self._store = store
        self._sleeps = sleeps
        self._unscored: Counter[str] = Counter()
        self._environment = environment
        self.scheduler = MultiTurnScheduler(servers, lambda: self.updater.version, thinking, environment, self._give_up)
        self.buffer = GroupBuffer(
            recipe,
            self.scheduler,
            lambda count: asyncio.to_thread(prompts.next, count),
            self._score_and_store,
            store.remove,
            self._sampling(recipe.rollout.temperature),
            lambda: self.updater.version,
            overlaps,
            TokenCounter(store.directory / RECEIVED_TOKENS),
        )

    async def start(self) -> None:
        """Wait until all servers are there; scoring processes start meanwhile."""
        self._scoring.start()
        if self._environment is not None:
            self._environment.processes.start()
        try:
            await asyncio.gather(
                self.servers.wait_healthy(self.recipe.rollout.start_timeout), self.updater.open_store()
            )
            if self._sleeps:
                await self.updater.sleep()
        except Refused as error:
            self.phase = f"failed: {error}"
            raise
        self.servers.watch()
        self.phase = "idle"

    async def close(self) -> None:
        """End what this controller started: answers under way, connections and scoring processes."""
        await self.buffer.close()
        await self.servers.close()
        self._scoring.close()
        if self._environment is not None:
            self._environment.processes.close()

    def status(self) -> dict[str, Any]:
        """Phase, progress, version, and the state of every server."""
        return {
            "phase": self.phase,
            "progress": self._progress.report(),
            "version": self.updater.version,
            "servers": self.servers.faults(),
        }

    async def rollout(self, step: int) -> dict[str, Any]:
        """One rollout batch: `batch.answers` stored and scored answers to each of `batch.prompts` prompts."""
        version = self._need_weights()
        batch, started = self.recipe.batch, time.monotonic()
        self._progress = Progress(batch.prompts * batch.answers, started, *self.buffer.done())
        self._unscored.clear()
        self.buffer.limit = self.recipe.rollout.answer_limit(step)
        groups = await self.buffer.take()
        samples = [ref for group in groups for ref in group.members]
        tokens = sum(ref.trained_length for ref in samples)
        seconds = time.monotonic() - started
        log.info("step %d: %d answers, %d tokens in %.2f s", step, len(samples), tokens, seconds)
        accounting = {
            **self.buffer.accounting.report(self.buffer.groups),
            "unscored": dict(self._unscored),
            "skipped_prompts": dict(self._prompts.skipped),
        }
        return {
            "samples": [asdict(ref) for ref in samples],
            "seconds": seconds,
            "tokens": tokens,
            "measures": measure_answers(self.recipe, samples, step),
            "staleness": measure_staleness(samples, version),
            "accounting": accounting,
        }

    async def evaluate(self, problems: int, answers: int, temperature: float) -> dict[str, Any]:
        """Score answers to held-out problems; nothing is stored. Training samples wait for their turn meanwhile."""
        self._need_weights()
        prompts = await asyncio.to_thread(self._prompts.held_out, problems)
        sampling = self._sampling(temperature)
        self._progress = Progress(len(prompts) * answers, time.monotonic())
        self.scheduler.hold(True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._evaluated(Generation(prompt, sample), sampling))
                    for prompt in prompts
                    for sample in range(answers)
                ]
        except ExceptionGroup as faults:
            # The first is the reason; the others are its consequences.
            raise faults.exceptions[0] from None
        finally:
            self.scheduler.hold(False)
        scored = [task.result() for task in tasks]
        count = len(scored)
        examples = [{"question": s.question, "answer_text": s.text, "reward": s.reward} for s in scored]
        return {
            "accuracy": sum(s.reward >= 1.0 for s in scored) / count,
            "mean_reward": sum(s.reward for s in scored) / count,
            "mean_length": sum(len(s.answer.token_ids) for s in scored) / count,
            "examples": examples[:NUM_EXAMPLES],
        }

    async def sleep(self) -> None:
        """See `WeightUpdater.sleep`."""
        await self.updater.sleep()
        self.phase = "idle"

    async def begin_update(self, version: int, terms: dict[str, Any], devices: Sequence[str] = ()) -> dict[str, Any]:
        """See `WeightUpdater.begin`."""
        self.phase = f"receiving weights of version {version}"
        return await self.updater.begin(version, terms, devices)

    async def finish_update(self, version: int, checksums: list[int], probes: list[dict[str, Any]]) -> dict[str, Any]:
        """See `WeightUpdater.finish`."""
        report = await self.updater.finish(version, checksums, [Probe(**probe) for probe in probes])
        self.scheduler.proceed()
        self.phase = "idle"
        return report

    async def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the controller; tokens of unfinished answers go to a store of their own."""
        async with self.buffer.admitting:
            rows, answers = describe_groups(self.buffer.groups)
            accounting = self.buffer.accounting.report(self.buffer.groups)
            stream = self._prompts.state()
        name = f"carried-{accounting['taken'].get('prompts', 0):08d}"
        generations = await asyncio.to_thread(store_generations, answers, self._store.beside(name)) if answers else []
        self._store.prune("carried-", KEPT_STATES)
        return {"stream": stream, "groups": rows, "accounting": accounting, "store": name, "drafts": generations}

    async def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what came after it is gone, and counted as dropped."""
        self._prompts.restore(state["stream"])
        in_flight = self._store.beside(state["store"]) if state["drafts"] else self._store
        groups = await asyncio.to_thread(read_groups, state["groups"], state["drafts"], in_flight)
        forget_lost_members(groups, self._store)
        known = {group.prompt.index: {ref.path for ref in group.members} for group in groups}
        started = state["stream"]["index"]
        self._store.sweep(lambda index, path: index < started and (index not in known or path in known[index]))
        self.buffer.restore(groups, state["accounting"])

    def _need_weights(self) -> int:
        if self.updater.version is None:
            raise Refused(NO_WEIGHTS)
        return self.updater.version

    def _sampling(self, temperature: float) -> Sampling:
        rollout, seed = self.recipe.rollout, self.recipe.run.seed
        stop_ids = self._tokenizer.stop_ids
        return Sampling(temperature, rollout.max_answer_tokens, stop_ids, seed, rollout.repetition_halt)

    async def _evaluated(self, generation: Generation, sampling: Sampling) -> Scored:
        return await self._score(generation, await self.scheduler.complete(generation, sampling, URGENT))

    async def _score_and_store(self, generation: Generation, reason: StopReason) -> SampleRef:
        """Score and store one answer to a training prompt."""
        scored = await self._score(generation, reason)
        return await asyncio.to_thread(self._store.write, generation.prompt, scored.answer, scored.reward)

    async def _score(self, generation: Generation, reason: StopReason) -> Scored:
        answer = generation.answer(reason)
        ids = generation.token_ids.tolist()
        if ids and ids[-1] in self._tokenizer.stop_ids:
            del ids[-1]
        text = self._tokenizer.decode(ids)
        # What an environment said is not the model's answer; what it made of it is.
        judged = self._tokenizer.decode(ids[generation.turn_start :]) if generation.calls else text
        verdict = await asyncio.wrap_future(self._scoring.submit(generation.prompt.problem, judged, reason))
        if isinstance(verdict, str):
            self._give_up(generation, verdict)
            verdict = 0.0
        self._progress.done += 1
        self._progress.tokens += generation.sampled
        return Scored(generation.prompt.problem.question, answer, text, verdict)

    def _give_up(self, generation: Generation, why: str) -> None:
        """Count an answer that scores 0 because a process of ours could not deal with it."""
        self._unscored[why] += 1
        log.warning("prompt %d, sample %d scores 0: %s", generation.prompt.index, generation.sample_index, why)
