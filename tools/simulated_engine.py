"""An engine that only costs time: decoding steps, KV that fills, prefill, pauses; it takes the place of a vLLM server.

It decodes all its answers together; a step takes `latency + per_answer * answers + per_kv_token * KV tokens`, so it
slows down as answers join and grow, and answers that do not fit its KV wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.scheduler import with_reserve
from gspo_megatron.types import StopReason

REVIEW_TOKENS = 256
"""Tokens an engine decodes before its speed is taken anew: its KV has grown meanwhile."""
PROMPT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What a server costs. Seconds a decoding step of B answers that hold K tokens of KV."""

    latency: float
    """Reading the weights."""
    per_answer: float
    """Computing one answer's next token."""
    per_kv_token: float
    """Reading one token of KV."""
    kv_tokens: int
    """KV that fits."""
    slots: int
    """Answers at a time at most."""
    prefill_rate: float = 50_000.0
    """Prompt tokens a second."""

    def step(self, answers: int, kv_tokens: float) -> float:
        """Seconds until every answer has one token more."""
        return self.latency + self.per_answer * answers + self.per_kv_token * kv_tokens

    def peak_rate(self, resident: float) -> float:
        """Most tokens a second, over all numbers of answers that hold so many tokens of KV each."""
        most = min(self.slots, int(self.kv_tokens / resident))
        return max(count / self.step(count, count * resident) for count in range(1, most + 1))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal answer lengths; answers to one prompt are alike."""

    median: float
    sigma: float
    limit: int
    within_group: float = 0.6
    """Correlation of two answers to one prompt."""

    def of(self, prompt: int, sample: int) -> int:
        """Tokens of one answer: always the same for the same place."""
        shared, own = _normal(f"{prompt}"), _normal(f"{prompt}/{sample}")
        z = math.sqrt(self.within_group) * shared + math.sqrt(1 - self.within_group) * own
        return max(1, min(self.limit, round(self.median * math.exp(self.sigma * z))))


def _normal(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest) + 0.5) / 2**64)


@dataclass(slots=True, eq=False)
class _Running:
    generation: Generation
    since: float
    """The engine's clock when it joined, in tokens an answer; the part up to the last update is in the generation."""
    done: asyncio.Future[StopReason]


@dataclass(slots=True, eq=False)
class SimulatedServer:
    """One engine; has what `Fleet` and `Scheduler` ask of a server."""

    model: EngineModel
    lengths: Lengths
    url: str
    fault: str = ""
    generations: set[Generation] = field(default_factory=set)
    _running: dict[Generation, _Running] = field(default_factory=dict)
    _waiting: list[_Running] = field(default_factory=list)
    _ends: list[tuple[float, int, _Running]] = field(default_factory=list)
    _clock: float = 0.0
    """Tokens that an answer which never stopped would have."""
    _seen: float = 0.0
    _stalled_until: float = 0.0
    _kv: float = 0.0
    _timer: asyncio.TimerHandle | None = None
    _version: Callable[[], int | None] = lambda: None
    _paused: bool = False

    @property
    def slots(self) -> int:
        """Answers that may be sent to it: the next one is there when one ends."""
        return with_reserve(self.model.slots)

    async def generate(
        self, generation: Generation, sampling: Sampling, version: Callable[[], int | None]
    ) -> StopReason:
        """Sample the rest of an answer."""
        self._advance()
        self._version = version
        running = _Running(generation, 0.0, asyncio.get_running_loop().create_future())
        generation.parts += 1
        self.generations.add(generation)
        self._waiting.append(running)
        self._schedule()
        try:
            return await running.done
        finally:
            self.generations.discard(generation)

    async def interrupt(self) -> None:
        """End everything where it is."""
        self._advance()
        self._flush()
        for running in [*self._running.values(), *self._waiting]:
            running.done.set_result("abort")
        self._running.clear()
        self._waiting.clear()
        self._ends.clear()
        self._kv = 0.0
        self._schedule()
        await asyncio.sleep(0)

    def pause(self) -> None:
        """Stand still for an update; what was sampled until now is of the old version."""
        self._advance()
        self._flush()
        self._paused = True
        self._schedule()

    def resume(self) -> None:
        """Go on, after the KV of the answers under way is made anew."""
        self._advance()
        self._paused = False
        self._stalled_until = asyncio.get_running_loop().time() + self._kv / self.model.prefill_rate
        self._schedule()

    def _length(self, generation: Generation) -> int:
        return self.lengths.of(generation.prompt.index, generation.sample_index)

    def _advance(self) -> None:
        """Bring the engine's clock to the loop's."""
        now = asyncio.get_running_loop().time()
        start = max(self._seen, min(self._stalled_until, now))
        if self._running and not self._paused and now > start:
            tokens = (now - start) / self.model.step(len(self._running), self._kv)
            self._clock += tokens
            self._kv += tokens * len(self._running)
        self._seen = now
        while self._ends and self._ends[0][0] <= self._clock + 1e-6:
            running = heapq.heappop(self._ends)[2]
            if self._running.pop(running.generation, None) is not None:
                self._kv -= PROMPT_TOKENS + self._length(running.generation)
                self._take(running, self._length(running.generation) - len(running.generation))
                running.done.set_result("stop")

    def _flush(self) -> None:
        """Hand over what was sampled so far."""
        for running in self._running.values():
            tokens = int(self._clock - running.since) - len(running.generation)
            self._take(running, max(0, min(tokens, self._length(running.generation) - 1 - len(running.generation))))

    def _take(self, running: _Running, tokens: int) -> None:
        version = self._version()
        assert version is not None
        blank = bytes(4 * tokens)
        running.generation.extend(array("i", blank), array("f", blank), version)

    def _schedule(self) -> None:
        """Let answers in that fit, and wake up at the next end or when the speed has changed."""
        now = asyncio.get_running_loop().time()
        while self._waiting and len(self._running) < self.model.slots:
            running = self._waiting[0]
            tokens = PROMPT_TOKENS + len(running.generation)
            if self._running and self._kv + tokens > 0.9 * self.model.kv_tokens:
                break
            self._waiting.pop(0)
            running.since = self._clock - len(running.generation)
            self._running[running.generation] = running
            self._kv += tokens
            self._stalled_until = max(self._stalled_until, now) + tokens / self.model.prefill_rate
            heapq.heappush(self._ends, (running.since + self._length(running.generation), id(running), running))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running and not self._paused:
            left = max(0.0, min(self._ends[0][0] - self._clock, REVIEW_TOKENS))
            wait = max(0.0, self._stalled_until - now) + left * self.model.step(len(self._running), self._kv)
            self._timer = asyncio.get_running_loop().call_later(wait + 1e-9, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._advance()
        self._schedule()
