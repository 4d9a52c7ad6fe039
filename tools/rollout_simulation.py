"""Rollout in simulated time: `GroupBuffer`, `Scheduler`, `ServerSet` and `Generation` are the real ones.

Engines and trainer only cost seconds, under an event loop whose clock jumps to the next event.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.group_buffer import GroupBuffer
from gspo_megatron.controller.groups import TokenCounter
from gspo_megatron.controller.scheduler import Scheduler
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.models import parse_recipe
from gspo_megatron.types import Problem, Prompt, SampleRef, StopReason
from tools.simulated_engine import PROMPT_TOKENS, EngineModel, Lengths, SimulatedServer


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop in which waiting costs nothing: the clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__(_Jump(self))
        self.now = 0.0

    def time(self) -> float:
        """Seconds of simulated time."""
        return self.now


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: SimulatedTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen: the rollout is stuck")
        self._loop.now += max(timeout, 0.0)
        return super().select(0)


class Unwritten(TokenCounter):
    """A count of tokens without a file: no attempt follows on a simulated one."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class Scenario:
    """A system: engines, answers, and a trainer that shares their devices or has its own."""

    engines: int
    model: EngineModel
    lengths: Lengths
    prompts: int
    answers: int
    train_seconds: float
    """Seconds of one step's training, old log-probs included."""
    update_seconds: float
    overlaps: bool
    """The engines go on while the trainer works."""
    staleness: int = 0
    over_provision: float | None = None
    pieces: int = 1
    """Takes a version: systems that train on mini-batches as they are complete take several."""
    steps: int = 12
    warmup: int = 4
    """Steps that are not counted: the pool fills."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scenario came to, per counted step."""

    seconds: float
    tokens: float
    """Answer tokens trained on."""
    wasted: float
    """Tokens sampled and dropped."""
    staleness: float
    """Mean versions behind of a trained token."""
    largest_staleness: int


def simulate(scenario: Scenario, recipe: Recipe, pool_class: type[GroupBuffer] = GroupBuffer) -> Outcome:
    """Run a scenario on the real pool and dispatcher."""
    loop = SimulatedTime()
    try:
        return loop.run_until_complete(_run(scenario, recipe, pool_class))
    finally:
        loop.close()


async def _run(scenario: Scenario, recipe: Recipe, pool_class: type[GroupBuffer]) -> Outcome:
    values = recipe.model_dump(mode="json")
    values["batch"] |= {"prompts": scenario.prompts, "answers": scenario.answers, "updates": 1}
    values["rollout"] |= {"max_staleness": scenario.staleness, "over_provision": scenario.over_provision}
    servers = [SimulatedServer(scenario.model, scenario.lengths, f"engine-{n}") for n in range(scenario.engines)]
    version: list[int | None] = [0]
    drawn = 0

    async def draw(count: int) -> list[Prompt]:
        nonlocal drawn
        drawn += count
        ids = (0,) * PROMPT_TOKENS
        return [Prompt(index, Problem(str(index), "", {}), ids) for index in range(drawn - count, drawn)]

    async def score(generation: Generation, reason: StopReason) -> SampleRef:
        segments = tuple(generation.segments)
        return SampleRef(
            "", generation.prompt.index, generation.sample_index, 1, len(generation), 0.0, reason, segments
        )

    def current() -> int | None:
        return version[0]

    scheduler = Scheduler(ServerSet(servers), current)  # type: ignore[arg-type]
    sampling = Sampling(1.0, scenario.lengths.limit, (0,), 0)
    chosen = parse_recipe(values)
    pool = pool_class(chosen, scheduler, draw, score, sampling, current, scenario.overlaps, Unwritten())
    loop = asyncio.get_running_loop()
    marks, lags, started, before = [], [], 0.0, pool.ledger.report(())
    for step in range(scenario.steps):
        if step == scenario.warmup:
            started = loop.time()
            before = pool.ledger.report(())
        refs = []
        for _ in range(scenario.pieces):
            refs += [ref for group in await pool.take() for ref in group.members]
            await asyncio.sleep(scenario.train_seconds / scenario.pieces)
        if step >= scenario.warmup:
            marks.append(sum(ref.answer_length for ref in refs))
            lags += [(step - span.version, span.end - span.start) for ref in refs for span in ref.segments]
        for server in servers:
            server.pause()
        version[0] = None
        await asyncio.sleep(scenario.update_seconds)
        version[0] = step + 1
        for server in servers:
            server.resume()
        scheduler.proceed()
    seconds = loop.time() - started
    after = pool.ledger.report(())
    dropped = sum(count.tokens for count in after.dropped.values()) - sum(
        count.tokens for count in before.dropped.values()
    )
    await pool.close()
    counted = len(marks)
    total = sum(count for _, count in lags)
    return Outcome(
        seconds / counted,
        sum(marks) / counted,
        dropped / counted,
        sum(lag * count for lag, count in lags) / total,
        max(lag for lag, _ in lags),
    )


def work_conserving_seconds(scenario: Scenario, tokens: float, draws: Sequence[int]) -> float:
    """Seconds a step that nothing can beat: engines always at their best rate, the trainer wholly hidden or not at all.

    Args:
        scenario: the system.
        tokens: answer tokens of a step.
        draws: sampled lengths; an answer that is under way holds half of them, counted by its tokens.
    """
    resident = PROMPT_TOKENS + sum(length * length for length in draws) / (2 * sum(draws))
    sampling = tokens / (scenario.engines * scenario.model.peak_rate(resident)) + scenario.update_seconds
    alone = scenario.train_seconds + scenario.update_seconds
    return max(sampling, alone) if scenario.overlaps else sampling + scenario.train_seconds
