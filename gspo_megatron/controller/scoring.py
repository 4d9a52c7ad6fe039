"""Scoring of finished generations in other processes: a reward that hangs or raises costs one response, not the run.

One that fails for a whole batch in the same way ends it: there is nothing to train on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.fault_tally import FaultTally
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.loop_pool import LoopPool
from gspo_megatron.controller.process_pool import Lost, ProcessPool, describe_error
from gspo_megatron.model_requests import longest_wait, make_headers
from gspo_megatron.rewards import judge as judges
from gspo_megatron.rewards.answer_text import THINK_END, opens_thinking
from gspo_megatron.rewards.reward_contract import is_asynchronous
from gspo_megatron.rewards.reward_input import RewardInput, make_input
from gspo_megatron.rewards.scorer import Rules, Verdict, load_reward, make_scorer
from gspo_megatron.types import Problem, Response, StopReason

SCORING_SECONDS = 10.0
"""Processor time for the score of one response; BACKSTOP times that by the clock."""
PROMPT_TAIL = 32
"""Tokens at the end of a prompt in which its template may open the thinking."""


class TextDecoder(Protocol):
    """What scoring needs of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Pool(Protocol):
    """What scoring needs of processes."""

    def start(self) -> None: ...
    def ask(self, problem: Problem, response: RewardInput, /) -> Future[Verdict | Lost]: ...
    def close(self) -> None: ...


def make_scoring_pool(recipe: Recipe, workers: int) -> Pool:
    """Processes of a recipe's scorer; one with an event loop for a reward that is awaited. Raises RecipeError."""
    make, own = functools.partial(make_scorer, recipe), load_reward(recipe.reward)
    if own is not None and is_asynchronous(own):
        judge = recipe.reward.judge
        if judge is not None:
            make_headers(judge, judges.NAME)  # said here, and not by a process that cannot start
        # What waits for a judge is not late before the judge is.
        more = {} if judge is None else {"at_once": judge.at_once, "patience": longest_wait(judge)}
        return LoopPool(make, SCORING_SECONDS, "scorer", **more)  # pyright: ignore[reportArgumentType]
    return ProcessPool(make, workers, SCORING_SECONDS, "scorer")


@dataclass(frozen=True, slots=True)
class Scored:
    """A response with its text and score."""

    question: str
    response: Response
    text: str
    reward: float
    parts: tuple[tuple[str, float], ...]
    unscored: str
    """Kind of the fault for which it has no score; empty = it was scored."""


class Scoring:
    """Scores generations and counts those without a score."""

    def __init__(self, recipe: Recipe, tokenizer: TextDecoder, pool: Pool) -> None:
        self.pool, self._tokenizer, self._reward = pool, tokenizer, recipe.reward
        # A score of an agent or an environment is taken as it is: `exact` and `weights` are about the reward.
        own = recipe.reward.model_copy(update={"exact": False, "weights": {}})
        self._own_rules, self._recipe = Rules(own), recipe
        thinking = recipe.rollout.thinking
        self._end = THINK_END if thinking is None else thinking.end
        self._tally = FaultTally(
            recipe.batch.prompts * recipe.batch.answers, "score", f"it gets {recipe.reward.bounds[0]:g}",
            "unscored/{kind}",
        )  # fmt: skip

    async def score(self, generation: Generation, reason: StopReason) -> Scored:
        """Score one finished generation.

        Raises:
            Refused: as many responses as a batch has got no score for the same reason.
        """
        response, ids = generation.response(reason), generation.token_ids
        said = ids[:-1] if ids and ids[-1] in self._tokenizer.stop_ids else ids
        text = self._tokenizer.decode(said)
        # An observation is not the model's response; only the last turn is scored.
        start = generation.turn_start if generation.calls else 0
        turn = self._tokenizer.decode(said[start:]) if start else text
        before = self._tokenizer.decode([*generation.prompt.token_ids, *ids[:start]][-PROMPT_TAIL:])
        judged = make_input(turn, ids, reason, self._reward.answer_marker, self._end, opens_thinking(before))
        verdict = self._read_outcome(generation, judged)
        if verdict is None:
            verdict = await asyncio.wrap_future(self.pool.ask(generation.prompt.problem, judged))
        fault = ""
        if isinstance(verdict, Lost):
            fault = self._count(generation, judged, verdict)
            verdict = Verdict(self._reward.bounds[0])
        elif verdict.is_computed:
            self._tally.clear()
        problem = generation.prompt.problem
        return Scored(problem.question, response, text, verdict.score, verdict.parts, fault)

    def _read_outcome(self, generation: Generation, judged: RewardInput) -> Verdict | Lost | None:
        """The verdict of the agent or environment that led a response; None = the reward is asked."""
        outcome = generation.outcome
        if outcome is None or isinstance(outcome, Lost):
            return outcome
        if self._own_rules.is_left_out(judged):
            return self._own_rules.lowest
        try:
            return self._own_rules.judge(outcome)
        except ValueError as error:
            return describe_error(error)

    def _count(self, generation: Generation, judged: RewardInput, lost: Lost) -> str:
        """Count a response without a score; the kind of its fault."""
        if generation.outcome is None:
            kind, key, name = lost.kind, "reward.name", self._reward.name
        elif self._recipe.agent is not None:
            kind, key, name = f"agent-{lost.kind}", "agent.program", self._recipe.agent.program
        else:
            assert self._recipe.environment is not None
            kind, key, name = f"environment-{lost.kind}", "environment.name", self._recipe.environment.name
        self._tally.count(generation, lost, kind, key, name, judged.text)
        return kind
