"""The controller: prompts to scored, stored, versioned responses, and the weight update.

The group buffer decides what is started when and which groups make a batch; the scheduler, which server samples what.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Any, Protocol

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.agent_endpoint import AgentEndpoint
from gspo_megatron.controller.agent_scheduler import Agents, AgentScheduler
from gspo_megatron.controller.answers_file import AnswersFile, report_evaluation
from gspo_megatron.controller.batch_metrics import Progress, count_unscored, measure_responses, measure_staleness
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.group_buffer import GroupBuffer
from gspo_megatron.controller.groups import TokenCounter
from gspo_megatron.controller.multi_turn import MultiTurnScheduler, Thinking
from gspo_megatron.controller.scheduler import URGENT
from gspo_megatron.controller.scoring import Pool, Scored, Scoring, TextDecoder
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.state import describe_groups, forget_lost_members, read_groups, store_generations
from gspo_megatron.controller.teacher_client import Teacher
from gspo_megatron.controller.weight_update import WeightUpdater
from gspo_megatron.data.store import SampleStore
from gspo_megatron.run_dir import NumberedName, RunDir
from gspo_megatron.transport.messages import (
    ControllerState,
    ControllerStatus,
    Empty,
    EvaluationReport,
    EvaluationRequest,
    RolloutBatch,
    RolloutRequest,
    StreamState,
)
from gspo_megatron.types import Prompt, SampleRef, StopReason

log = logging.getLogger(__name__)
RECEIVED_TOKENS = "received_tokens"
"""File of the sample store."""
IN_FLIGHT = NumberedName("in_flight", 8)
"""Stores of the responses that a checkpoint has in flight, by prompts taken."""
KEPT_STATES = 3
"""Checkpoints of which unfinished responses are kept; the trainer keeps fewer."""
NO_WEIGHTS = "no server has weights yet; send them with /weights/begin and /weights/finish first"


class Prompts(Protocol):
    """What the controller needs of a prompt stream."""

    skipped: Counter[str]

    def next(self, count: int) -> list[Prompt]: ...
    def held_out(self, count: int | None) -> list[Prompt]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Controller:
    """One run's controller; its methods run one at a time."""

    def __init__(
        self,
        recipe: Recipe,
        servers: ServerSet,
        prompts: Prompts,
        tokenizer: TextDecoder,
        scoring: Pool,
        store: SampleStore,
        host: str,
        overlaps: bool,
        sleeps: bool,
        thinking: Thinking | None = None,
        environment: EnvironmentPool | None = None,
        loaded: bool = False,
        agents: Agents | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """
        Args:
            recipe: the run.
            servers: all servers of the run.
            prompts: where its prompts come from.
            tokenizer: turns responses into text for the scorer.
            scoring: processes that score them.
            store: keeps them.
            host: this controller's address as the trainer and the servers reach it.
            overlaps: the servers have devices of their own and continue while the trainer works.
            sleeps: servers and trainer take turns on the same devices.
            thinking: limit of the thinking within a response.
            environment: the environment that replies between turns.
            loaded: the servers have loaded weights themselves, and no update comes.
            agents: make the responses.
            teacher: scores the tokens of training responses.
        """
        self.recipe = recipe
        self.servers = servers
        self.updater = WeightUpdater(
            servers, recipe.weight_update, host, sleeps, on_open=lambda: self.scheduler.proceed()
        )
        self._phase = "waiting for servers"
        self._progress = Progress()
        self._prompts = prompts
        self._tokenizer = tokenizer
        self.scoring = Scoring(recipe, tokenizer, scoring)
        self._store = store
        self._sleeps, self._loaded = sleeps, loaded
        self._environment, self._teacher = environment, teacher
        self.scheduler, self._endpoint = self._schedule(thinking, agents)
        self.buffer = GroupBuffer(
            recipe,
            self.scheduler,
            lambda count: asyncio.to_thread(prompts.next, count),
            self._score_and_store,
            replace(self._sampling(recipe.rollout.temperature), routes=recipe.objective.replay == "sampler"),
            lambda: self.updater.version,
            overlaps,
            TokenCounter(store.directory / RECEIVED_TOKENS),
        )

    async def open_teacher(self) -> None:
        """Connect to the teacher, if there is one: one that does not do ends a run before anything is waited for.

        Raises:
            Refused: why it does not.
        """
        if self._teacher is not None:
            await self._teacher.start()

    async def start(self) -> None:
        """Wait until all servers are there; scoring processes start meanwhile."""
        self.scoring.pool.start()
        if self._environment is not None:
            self._environment.processes.start()
        try:
            if self._endpoint is not None:
                await self._endpoint.start()
            await asyncio.gather(
                self.servers.wait_healthy(self.recipe.rollout.start_timeout), self.updater.open_store()
            )
            if self._sleeps:
                await self.updater.sleep(Empty())
            if self._loaded:
                await self.updater.adopt()
        except Refused as error:
            self._phase = f"failed: {error}"
            raise
        self.servers.watch()
        self._phase = "idle"

    async def close(self) -> None:
        """End what this controller started: generations in flight, connections and scoring processes."""
        await self.buffer.close()
        await self.scheduler.close()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._teacher is not None:
            await self._teacher.close()
        await self.servers.close()
        self.scoring.pool.close()
        if self._environment is not None:
            self._environment.processes.close()

    @property
    def phase(self) -> str:
        """What the controller is doing, in words; see `ControllerStatus.phase`."""
        receiving = self.updater.receiving
        return self._phase if receiving is None else f"receiving weights of version {receiving}"

    async def status(self, request: Empty) -> ControllerStatus:
        """Phase, progress, version, and the state of every server."""
        return ControllerStatus(
            phase=self.phase,
            progress=self._progress.report(),
            version=self.updater.version,
            servers=self.servers.faults(),
        )

    async def rollout(self, request: RolloutRequest) -> RolloutBatch:
        """One rollout batch: `batch.answers` stored and scored responses to each of `batch.prompts` prompts."""
        version = self._need_weights()
        batch, started = self.recipe.batch, time.monotonic()
        self._progress = Progress(batch.prompts * batch.answers, started, *self.buffer.done())
        self.buffer.limit = self.recipe.rollout.answer_limit(request.step)
        groups = await self.buffer.take()
        samples = [ref for group in groups for ref in group.members]
        tokens = sum(ref.trained_length for ref in samples)
        in_flight = [ref for group in self.buffer.groups for ref in group.members]
        trained = [(group.prompt, group.members) for group in groups]
        keep = self.recipe.rollout.keep_samples
        await asyncio.to_thread(self._store.finish_step, request.step, trained, in_flight, keep)
        seconds = time.monotonic() - started
        log.info("step %d: %d responses, %d tokens in %.2f s", request.step, len(samples), tokens, seconds)
        return RolloutBatch(
            samples=tuple(samples),
            seconds=seconds,
            tokens=tokens,
            measures=measure_responses(self.recipe, samples, request.step) | self.scheduler.measure(),
            staleness=measure_staleness(samples, version),
            accounting=self.buffer.ledger.report(self.buffer.groups),
            unscored=count_unscored(samples),
            skipped_prompts=dict(self._prompts.skipped),
        )

    async def evaluate(self, request: EvaluationRequest) -> EvaluationReport:
        """Score responses to held-out problems; none is stored as a sample. Training samples wait meanwhile."""
        self._need_weights()
        prompts = await asyncio.to_thread(self._prompts.held_out, request.problems)
        sampling = self._sampling(request.temperature)
        self._progress = Progress(len(prompts) * request.answers, time.monotonic())
        file = RunDir(self._store.directory.parent).answers if request.keep else None
        self.scheduler.hold(True)
        try:
            with AnswersFile(file, self.recipe.reward.bounds[1]) as answers:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._evaluated(Generation(prompt, sample), sampling, answers))
                        for prompt in prompts
                        for sample in range(request.answers)
                    ]
        except ExceptionGroup as faults:
            # The first is the reason; the others are its consequences.
            raise faults.exceptions[0] from None
        finally:
            self.scheduler.hold(False)
        return report_evaluation(request, [task.result() for task in tasks], self.recipe.reward.bounds[1])

    async def state(self, request: Empty) -> ControllerState:
        """What a checkpoint must hold of the controller; a store of its own takes tokens of unfinished generations."""
        async with self.buffer.admitting:
            groups, responses = describe_groups(self.buffer.groups, self._endpoint is not None)
            accounting = self.buffer.ledger.report(self.buffer.groups)
            stream = StreamState.model_validate(self._prompts.state())
        # A power failure after the checkpoint must not take what it refers to.
        await asyncio.to_thread(self._store.seal)
        name = IN_FLIGHT.name(accounting.taken.prompts)
        stored = await asyncio.to_thread(store_generations, responses, self._store.beside(name)) if responses else []
        self._store.prune(IN_FLIGHT, KEPT_STATES)
        return ControllerState(
            stream=stream, groups=tuple(groups), accounting=accounting, store=name, generations=tuple(stored)
        )

    async def restore(self, state: ControllerState) -> Empty:
        """Continue where `state` was taken; what came after it is gone, and counted as dropped."""
        self._prompts.restore(state.stream.model_dump())
        unfinished = self._store.beside(state.store) if state.generations else self._store
        groups = await asyncio.to_thread(read_groups, state.groups, state.generations, unfinished)
        forget_lost_members(groups, self._store)
        self.buffer.restore(groups, state.accounting)
        return Empty()

    def _schedule(
        self, thinking: Thinking | None, agents: Agents | None
    ) -> tuple[MultiTurnScheduler, AgentEndpoint | None]:
        """What brings responses to their end; with an agent also the endpoint that it talks to."""
        version, environment = lambda: self.updater.version, self._environment
        if agents is None:
            return MultiTurnScheduler(self.servers, version, thinking, environment), None
        scheduler = AgentScheduler(self.servers, version, thinking, self.recipe, agents)
        return scheduler, AgentEndpoint(scheduler)

    def _need_weights(self) -> int:
        if self.updater.version is None:
            raise Refused(NO_WEIGHTS)
        return self.updater.version

    def _sampling(self, temperature: float) -> Sampling:
        rollout, seed = self.recipe.rollout, self.recipe.run.seed
        stop_ids = self._tokenizer.stop_ids
        return Sampling(temperature, rollout.max_answer_tokens, stop_ids, seed, rollout.repetition_halt)

    async def _evaluated(self, generation: Generation, sampling: Sampling, answers: AnswersFile) -> Scored:
        scored = await self._score(generation, await self.scheduler.complete(generation, sampling, URGENT))
        answers.add(generation.prompt, scored)
        return scored

    async def _score_and_store(self, generation: Generation, reason: StopReason) -> SampleRef:
        """Score and store one response to a training prompt."""
        scored = await self._score(generation, reason)
        response, fault = scored.response, ""
        if self._teacher is not None:
            response, fault = await self._teacher.add_logprobs(generation, response)
        ref = await asyncio.to_thread(self._store.write, generation.prompt, response, scored.reward)
        generation.routes.cut(0)  # of all that a response holds the largest; its group may wait for others
        return replace(ref, parts=scored.parts, unscored=scored.unscored, teacher_fault=fault)

    async def _score(self, generation: Generation, reason: StopReason) -> Scored:
        scored = await self.scoring.score(generation, reason)
        self._progress.done += 1
        self._progress.tokens += generation.sampled
        return scored
