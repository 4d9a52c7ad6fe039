"""Scoring of finished generations in other processes: a reward that hangs or raises costs one response, not the run.

One that fails for a whole batch in the same way ends it: there is nothing to train on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from gspo_megatron.config.hooks import is_reference
from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.loop_pool import LoopPool
from gspo_megatron.controller.process_pool import Lost, ProcessPool, describe_error
from gspo_megatron.controller.servers import Refused
from gspo_megatron.rewards.answer_text import THINK_END, opens_thinking
from gspo_megatron.rewards.judge import longest_wait, read_key
from gspo_megatron.rewards.reward_contract import is_asynchronous
from gspo_megatron.rewards.reward_input import RewardInput, make_input
from gspo_megatron.rewards.scorer import Rules, Verdict, load_reward, make_scorer
from gspo_megatron.types import Problem, Response, StopReason

log = logging.getLogger(__name__)

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
            read_key(judge)  # said here, and not by a process that cannot start
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
        # An agent's own score is taken as it is: `exact` and `weights` are about the reward.
        own = recipe.reward.model_copy(update={"exact": False, "weights": {}})
        self._agent_rules, self._agent = Rules(own), recipe.agent
        thinking = recipe.rollout.thinking
        self._end = THINK_END if thinking is None else thinking.end
        self._batch = recipe.batch.prompts * recipe.batch.answers
        self._quoted: set[str] = set()
        self._alike = 0
        """Responses in a row without a score, for the reason `_reason`."""
        self._reason = ""

    async def score(self, generation: Generation, reason: StopReason) -> Scored:
        """Score one finished generation.

        Raises:
            Refused: as many responses as a batch has got no score for the same reason.
        """
        response, ids = generation.response(reason), generation.token_ids.tolist()
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
        fault = generation.fault
        if isinstance(verdict, Lost):
            fault = verdict.kind if generation.outcome is None else f"agent-{verdict.kind}"
            self._count(generation, judged, verdict)
            verdict = Verdict(self._reward.bounds[0])
        elif verdict.is_computed:
            self._alike = 0
        problem = generation.prompt.problem
        return Scored(problem.question, response, text, verdict.score, verdict.parts, fault)

    def _read_outcome(self, generation: Generation, judged: RewardInput) -> Verdict | Lost | None:
        """The verdict of the agent that made a response; None = the reward is asked."""
        outcome = generation.outcome
        if outcome is None or isinstance(outcome, Lost):
            return outcome
        if self._agent_rules.is_left_out(judged):
            return self._agent_rules.lowest
        try:
            return self._agent_rules.judge(outcome)
        except ValueError as error:
            return describe_error(error)

    def _count(self, generation: Generation, judged: RewardInput, lost: Lost) -> None:
        """Quote the first failure of each kind, and end the run when a whole batch fails alike."""
        reason = f"{lost.kind} {lost.why.partition(':')[0]}" if lost.kind == "raised" else lost.kind
        key, name, kind = "reward.name", self._reward.name, lost.kind
        if self._agent is not None and generation.outcome is not None:
            key, name, kind = "agent.program", self._agent.program, f"agent-{lost.kind}"
        if reason not in self._quoted:
            self._quoted.add(reason)
            log.warning(
                "%s=%s gave no score to sample %d of prompt %d (problem %s): %s; it gets %g, and the metric "
                "unscored/%s counts the others\nthe response ends %r\n%s",
                key, name, generation.sample_index, generation.prompt.index, generation.prompt.problem.id, lost.why,
                self._reward.bounds[0], kind, judged.text[-200:], lost.trace,
            )  # fmt: skip
        self._alike = self._alike + 1 if reason == self._reason else 1
        self._reason = reason
        if self._alike >= self._batch:
            fix = f"run `gspo check {name}`" if is_reference(name) else "see the controller's log"
            raise Refused(
                f"{key}={name} gave no score to {self._alike} responses in a row, a whole batch: {lost.why}; "
                f"correct it ({fix}), then start the run again"
            )
