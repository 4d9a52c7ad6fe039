"""The controller: prompts to scored, stored, versioned answers, and the weight update.

Role entry: `python -m gspo_megatron.rollout.controller --run-dir DIR --host H --port P --servers URL,URL`.
Synchronous: a batch is complete before the weights change.
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
from gspo_megatron.data.store import SampleStore
from gspo_megatron.rollout.client import Sampling, ServerError
from gspo_megatron.rollout.fleet import Fleet, Refused
from gspo_megatron.rollout.scoring import ScoringPool
from gspo_megatron.rollout.weight_update import Probe, WeightUpdater
from gspo_megatron.types import Answer, Prompt, SampleRef

log = logging.getLogger(__name__)
NUM_EXAMPLES = 3


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


@dataclass(slots=True)
class Progress:
    """How far the present phase is."""

    done: int = 0
    """Answers finished and scored."""
    total: int = 0
    """Answers asked for."""
    tokens: int = 0
    """Answer tokens of the finished ones."""
    started: float = 0.0
    """Monotonic clock at the start of the phase."""

    def report(self) -> dict[str, float]:
        """As JSON, with the seconds so far."""
        seconds = time.monotonic() - self.started if self.total else 0.0
        return {"done": self.done, "total": self.total, "tokens": self.tokens, "seconds": seconds}


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer with its text and score."""

    prompt: Prompt
    answer: Answer
    text: str
    reward: float


class Controller:
    """One run's controller; its methods run one at a time."""

    def __init__(
        self,
        recipe: Recipe,
        fleet: Fleet,
        prompts: Prompts,
        tokenizer: TextDecoder,
        scoring: ScoringPool,
        store: SampleStore,
        host: str,
    ) -> None:
        self.recipe = recipe
        self.fleet = fleet
        self.updater = WeightUpdater(fleet, recipe.weight_update, host)
        self.phase = "waiting for servers"
        self.progress = Progress()
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scoring = scoring
        self._store = store
        self._unscored: Counter[str] = Counter()

    async def start(self) -> None:
        """Wait until all servers are there; scoring processes start meanwhile."""
        self._scoring.start()
        try:
            await asyncio.gather(self.fleet.wait_healthy(self.recipe.rollout.start_timeout), self.updater.open_store())
        except Refused as error:
            self.phase = f"failed: {error}"
            raise
        self.phase = "idle"

    async def close(self) -> None:
        """End what this controller started: connections and scoring processes."""
        await self.fleet.close()
        self._scoring.close()

    def status(self) -> dict[str, Any]:
        """Phase, progress, version, and the state of every server."""
        return {
            "phase": self.phase,
            "progress": self.progress.report(),
            "version": self.updater.version,
            "servers": self.fleet.faults(),
        }

    async def rollout(self, step: int) -> dict[str, Any]:
        """One rollout batch: `batch.answers` stored and scored answers to each of the next `batch.prompts` prompts."""
        batch = self.recipe.batch
        started = time.monotonic()
        prompts = await asyncio.to_thread(self._prompts.next, batch.prompts)
        scored = await self._sample(prompts, batch.answers, self.recipe.rollout.temperature)
        samples = await asyncio.to_thread(self._keep, scored)
        tokens = sum(ref.answer_length for ref in samples)
        seconds = time.monotonic() - started
        log.info("step %d: %d answers, %d tokens in %.2f s", step, len(samples), tokens, seconds)
        accounting = {
            "sampled": len(scored),
            "kept": len(samples),
            "dropped": {},
            "unscored": dict(self._unscored),
            "skipped_prompts": dict(self._prompts.skipped),
        }
        rows = [asdict(ref) for ref in samples]
        return {"samples": rows, "seconds": seconds, "tokens": tokens, "accounting": accounting}

    async def evaluate(self, problems: int, answers: int, temperature: float) -> dict[str, Any]:
        """Score answers to held-out problems; nothing is stored."""
        prompts = await asyncio.to_thread(self._prompts.held_out, problems)
        scored = await self._sample(prompts, answers, temperature)
        count = len(scored)
        examples = [{"question": s.prompt.problem.question, "answer_text": s.text, "reward": s.reward} for s in scored]
        return {
            "accuracy": sum(s.reward >= 1.0 for s in scored) / count,
            "mean_reward": sum(s.reward for s in scored) / count,
            "mean_length": sum(len(s.answer.token_ids) for s in scored) / count,
            "examples": examples[:NUM_EXAMPLES],
        }

    async def begin_update(self, version: int, terms: dict[str, Any]) -> dict[str, Any]:
        """See `WeightUpdater.begin`."""
        self.phase = f"receiving weights of version {version}"
        return await self.updater.begin(version, terms)

    async def finish_update(self, version: int, checksums: list[int], probes: list[dict[str, Any]]) -> dict[str, Any]:
        """See `WeightUpdater.finish`."""
        report = await self.updater.finish(version, checksums, [Probe(**probe) for probe in probes])
        self.phase = "idle"
        return report

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the controller."""
        return {"stream": self._prompts.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._prompts.restore(state["stream"])

    async def _sample(self, prompts: Sequence[Prompt], answers: int, temperature: float) -> list[Scored]:
        """All answers to all prompts, scored, in the order of prompts and samples."""
        if self.updater.version is None:
            raise Refused("no server has weights yet; send them with /weights/begin and /weights/finish first")
        limit, seed = self.recipe.rollout.max_answer_tokens, self.recipe.run.seed
        sampling = Sampling(temperature, limit, self._tokenizer.stop_ids, seed)
        self.progress = Progress(total=len(prompts) * answers, started=time.monotonic())
        self._unscored.clear()
        try:
            async with self.fleet.watched(), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(prompt, sample, sampling))
                    for prompt in prompts
                    for sample in range(answers)
                ]
        except ExceptionGroup as faults:
            # The first is the reason; the others are its consequences.
            raise faults.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, prompt: Prompt, sample: int, sampling: Sampling) -> Scored:
        answer = await self._generate(prompt, sample, sampling)
        text = self._tokenizer.decode(self._without_stop(answer))
        verdict = await asyncio.wrap_future(self._scoring.submit(prompt.problem, text, answer.stop_reason))
        if isinstance(verdict, str):
            self._unscored[verdict] += 1
            log.warning("the answer to prompt %d, sample %d scores 0: %s", prompt.index, sample, verdict)
        self.progress.done += 1
        self.progress.tokens += len(answer.token_ids)
        return Scored(prompt, answer, text, 0.0 if isinstance(verdict, str) else verdict)

    async def _generate(self, prompt: Prompt, sample: int, sampling: Sampling) -> Answer:
        """One answer from the prompt's own server, whose prefix cache holds it; from another if that one is lost."""
        while True:
            live = self.fleet.live
            if not live:
                raise Refused(f"no server is left: {'; '.join(self.fleet.faults().values())}")
            server = live[prompt.index % len(live)]
            try:
                answer = await server.generate(prompt, sample, sampling)
            except ServerError as error:
                self.fleet.drop(server, str(error))
                continue
            except ValueError as error:
                raise Refused(f"prompt {prompt.index}: {error}") from None
            versions = {segment.version for segment in answer.segments}
            if versions != {self.updater.version}:
                raise Refused(f"server {server.url} used weights of version {versions}, not {self.updater.version}")
            return answer

    def _without_stop(self, answer: Answer) -> list[int]:
        ids = answer.token_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self._tokenizer.stop_ids else ids

    def _keep(self, scored: Sequence[Scored]) -> list[SampleRef]:
        return [self._store.write(s.prompt, s.answer, s.reward) for s in scored]


if __name__ == "__main__":
    from gspo_megatron.rollout.service import main

    main()
