"""Answers of several turns, thinking closed by force, length stages and halts, over a server that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.environment_pool import EnvironmentPool
from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.multi_turn import MultiTurnScheduler, Thinking
from gspo_megatron.controller.process_pool import Lost, ProcessPool
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.data.samples import build_samples
from gspo_megatron.environments import Turn
from gspo_megatron.models import parse_recipe
from gspo_megatron.transport.messages import ControllerState, Empty, EvaluationRequest, RolloutRequest
from gspo_megatron.types import Masked, Problem, Segment
from tests.unit.controller.controllers import controlling, set_scorer
from tests.unit.controller.fakes import FakeServer, make_prompt
from tests.unit.controller.group_batches import check_accounting, recipe, set_version

STOP, CALL, END = 0, 7, 4
"""Ids that end an answer, a call and a thinking."""
CALCULATOR = {"name": "calculator"}


class Partner(ProcessPool):
    """An environment in this thread: says 30 plus the last number but one, twice; its state counts."""

    def __init__(self) -> None:
        super().__init__(lambda: print, 1, 1.0, "environment")
        self.heard: list[tuple[Any, list[int]]] = []
        self.fault, self.faults = "", 2
        self.turn = lambda state, action: Turn(self.says(action), (state or 0) + 1)
        self.says: Callable[[Sequence[int]], tuple[int, ...]] = lambda action: (30 + action[-2],) * 2

    def start(self) -> None:
        pass

    def ask(self, *job: Any) -> Future[Any]:
        _, state, action = job
        self.heard.append((state, list(action)))
        future: Future[Any] = Future()
        turn = self.turn(state, action)
        fails = self.fault and self.faults
        self.faults -= bool(fails)
        future.set_result(Lost("out-of-time", self.fault) if fails else turn)
        return future


@asynccontextmanager
async def talking(
    directory: Path, fake: FakeServer, partner: Partner | None = None, thinking: Thinking | None = None,
    settings: Recipe | None = None, always: bool = False,
) -> AsyncIterator[Controller]:  # fmt: skip
    async with controlling(directory, fake, recipe=settings or one_prompt(), overlaps=True) as controller:
        environment = EnvironmentPool((CALL,), 2, partner, always) if partner is not None else None
        controller.scheduler = MultiTurnScheduler(
            controller.servers, lambda: controller.updater.version, thinking, environment
        )
        controller.buffer._scheduler = controller.scheduler
        yield controller


def one_prompt(environment: dict[str, Any] | None = None, **rollout: Any) -> Recipe:
    """A batch is one prompt with three answers."""
    values = recipe(prompts=1, **rollout).model_dump(mode="json")
    return parse_recipe(values | {"environment": environment})


def follow(turns: Sequence[Sequence[int]]) -> Callable[[dict[str, Any]], Sequence[int]]:
    """The part-th request of every answer samples the part-th of these."""
    return lambda body: turns[int(body["request_id"].split("-")[2])]


async def test_an_environment_speaks_between_the_turns(tmp_path: Path) -> None:
    fake, partner, judged = FakeServer(), Partner(), []
    fake.ids = follow([[5, CALL], [6, 6, CALL], [8, STOP]])
    async with talking(tmp_path, fake, partner, settings=one_prompt(CALCULATOR)) as controller:
        set_scorer(controller, lambda problem, text, reason: judged.append((text, reason)) or 1.0)
        batch = await controller.rollout(RolloutRequest(step=1))
        row = batch.samples[0]
        sample = build_samples([row], controller._store)[0]
        check_accounting(batch, controller, fake)
    # Ids are appended: each request starts from exactly what was there, and what the environment said.
    asked = [body for body in fake.bodies if body["request_id"].startswith("0-0-")]
    assert [body["token_ids"] for body in asked] == [
        [1], [1, 5, CALL, 35, 35], [1, 5, CALL, 35, 35, 6, 6, CALL, 36, 36],
    ]  # fmt: skip
    assert [body["sampling_params"]["max_tokens"] for body in asked] == [12, 8, 3]
    assert all(body["sampling_params"]["stop_token_ids"] == [STOP, CALL] for body in asked)
    assert partner.heard[:1] == [(None, [5, CALL])] and (1, [6, 6, CALL]) in partner.heard
    assert row.masked == (Masked(2, 4, "observation"), Masked(7, 9, "observation"))
    assert row.segments == (Segment(0, 0, 11),) and (row.answer_length, row.trained_length) == (11, 7)
    assert sample.loss_mask.tolist() == [False] + [True] * 2 + [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2
    assert sample.rollout_logprobs.tolist() == [0.0, -0.5, -0.5, 0, 0, -0.5, -0.5, -0.5, 0, 0, -0.5, -0.5]
    assert judged == [("8", "stop")] * 3, "the model is judged by what it says last"
    assert batch.tokens == 3 * 7 and batch.measures["tool_calls"] == 2.0
    assert batch.measures["masked_tokens"] == pytest.approx(4 / 11)


@pytest.mark.parametrize(
    ("turns", "says", "fault", "length", "masked"),
    [
        # The third call is one too many.
        ([[5, CALL]] * 3, (9,), "", 8, [(2, 3), (5, 6)]),
        # There is room for two of three words.
        ([[5] * 9 + [CALL]], (9, 9, 9), "", 12, [(10, 12)]),
        ([[5, CALL], [8, STOP]], (9,), "its environment took more than 10 s", 2, []),
        ([[5] * 11 + [CALL]], (9,), "", 12, []),
    ],
)
async def test_what_cuts_a_conversation(
    tmp_path: Path, turns: list[list[int]], says: tuple[int, ...], fault: str, length: int, masked: list[Any]
) -> None:
    fake, partner = FakeServer(), Partner()
    fake.ids, partner.fault, partner.says = follow(turns), fault, lambda action: says
    async with talking(tmp_path, fake, partner, settings=one_prompt(CALCULATOR)) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        check_accounting(batch, controller, fake)
    assert batch.unscored == ({"environment-out-of-time": 2} if fault else {})
    for row in batch.samples[: 2 if fault else 3]:
        spans = [(span.start, span.end) for span in row.masked]
        assert (row.stop_reason, row.answer_length, spans) == ("length", length, masked)


async def test_an_environment_that_fails_for_a_whole_batch_ends_the_run(tmp_path: Path) -> None:
    fake, partner = FakeServer(), Partner()
    fake.ids, partner.fault, partner.faults = follow([[5, CALL]]), "its environment's process died", 9
    async with talking(tmp_path, fake, partner, settings=one_prompt(CALCULATOR)) as controller:
        with pytest.raises(Refused, match=r"environment\.name=calculator gave no score to 3 responses in a row"):
            await controller.rollout(RolloutRequest(step=1))


async def test_an_environment_of_one_s_own_ends_and_scores_the_episode(tmp_path: Path) -> None:
    """It replies to stop tokens too; the sum of its rewards is the score, and one cut at the limit is asked as well."""
    fake, partner = FakeServer(), Partner()
    fake.ids = follow([[5, STOP], [6, STOP]])
    partner.turn = lambda state, action: Turn(
        (9,), (state or 0) + 1, done=action[0] == 6, reward={"a": 0.25 * action[0]}
    )
    async with talking(tmp_path, fake, partner, settings=one_prompt(CALCULATOR), always=True) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        ids = [controller._store.read(row)[0].tolist() for row in batch.samples]
        check_accounting(batch, controller, fake)
    assert ids == [[1, 5, STOP, 9, 6, STOP]] * 3 and {row.stop_reason for row in batch.samples} == {"stop"}
    assert {row.reward for row in batch.samples} == {1.0} and batch.samples[0].parts == (("a", 1.5),)
    assert [state for state, _ in partner.heard if state is not None] == [1] * 3


async def test_a_turn_that_is_cut_is_scored_by_the_environment_too(tmp_path: Path) -> None:
    """Else the recipe's reward would score it, and a group would hold scores of two kinds."""
    fake, partner, judged = FakeServer(), Partner(), []
    fake.ids = follow([[5, STOP], [6] * 20])
    partner.turn = lambda state, action: Turn((9,), (state or 0) + 1, reward={"a": 0.25 * ((state or 0) + 1)})
    plain = one_prompt(CALCULATOR)
    settings = plain.model_copy(update={"reward": plain.reward.model_copy(update={"require_stop": False})})
    async with talking(tmp_path, fake, partner, settings=settings, always=True) as controller:
        set_scorer(controller, lambda problem, text, reason: judged.append(text) or 1.0)
        batch = await controller.rollout(RolloutRequest(step=1))
        check_accounting(batch, controller, fake)
    assert {row.stop_reason for row in batch.samples} == {"length"} and not judged
    assert {row.parts for row in batch.samples} == {(("a", 0.5),)}
    assert [action for state, action in partner.heard if state] == [[6] * 9] * 3


async def test_a_conversation_goes_on_where_a_checkpoint_caught_it(tmp_path: Path) -> None:
    """Between a call and its reply, with a state and behind a stop token: nothing is asked twice, nothing left out."""

    fake, partner = FakeServer(), Partner()
    async with talking(tmp_path / "samples", fake, partner, settings=one_prompt(CALCULATOR)) as controller:
        await controller.buffer._admit()  # not taking: nothing is started
        fake.hang = True
        taking = asyncio.create_task(controller.rollout(RolloutRequest(step=1)))
        while len(fake.bodies) < 3:
            await asyncio.sleep(0.01)
        called, answered, ended = controller.buffer.groups[0].generations
        called.extend([5, CALL], [-0.5] * 2, 0)
        answered.extend([5, CALL], [-0.5] * 2, 0)
        answered.put_in([35, 35], "observation")
        answered.state = 1
        ended.extend([5, STOP], [-0.5] * 2, 0)
        state = ControllerState.from_json((await controller.state(Empty())).to_json())
        taking.cancel()
    fake = FakeServer()
    fake.ids = lambda body: [6, CALL] if body["request_id"].startswith("0-1-1") else [8, STOP]
    async with talking(tmp_path / "samples", fake, partner, settings=one_prompt(CALCULATOR)) as controller:
        await controller.restore(state)
        batch = await controller.rollout(RolloutRequest(step=1))
        ids = [controller._store.read(row)[0].tolist() for row in batch.samples]
    assert ids == [
        [1, 5, CALL, 35, 35, 8, STOP],
        [1, 5, CALL, 35, 35, 6, CALL, 36, 36, 8, STOP],
        [1, 5, STOP],
    ]
    assert partner.heard == [(None, [5, CALL]), (1, [6, CALL])]
    assert [len(row.masked) for row in batch.samples] == [1, 2, 0]
    assert {body["request_id"][:3] for body in fake.bodies} == {"0-0", "0-1"}


CLOSING = Thinking(budget=3, end_id=END, closing=(8, END))


@pytest.mark.parametrize(("ids", "reason"), [([5, STOP], "stop"), ([5, 6, 8], "length")])
async def test_an_answer_that_had_ended_when_a_checkpoint_caught_it_is_not_sampled_on(
    ids: list[int], reason: str
) -> None:
    """It was still being scored: a request for 0 tokens would cost the server, and nothing may follow a stop token."""
    turns = MultiTurnScheduler(ServerSet([]), lambda: 1, None, None)
    generation = Generation(make_prompt(0), 0)
    generation.extend(ids, [0.0] * len(ids), 1)
    assert await turns.complete(generation, Sampling(1.0, 3, (STOP,), 0)) == reason
    assert generation.token_ids.tolist() == ids and generation.parts == 0


@pytest.mark.parametrize(
    ("budget", "turns", "ids", "masked"),
    [
        (3, [[5, 5, 5, 5], [6, STOP]], [5, 5, 5, 8, END, 6, STOP], [(3, 5)]),
        (3, [[5, END, 6, 6], [6, STOP]], [5, END, 6, 6, STOP], []),
        (3, [[5, STOP]], [5, STOP], []),
        (3, [[5, 5, 5], [6] * 20], [5, 5, 5, 8, END] + [6] * 7, [(3, 5)]),
        (11, [[5] * 20], [5] * 11 + [8], [(11, 12)]),
    ],
    ids=["thinks on", "is done by itself", "is short", "goes on to the limit", "leaves room for one word"],
)
async def test_thinking_is_closed_at_its_budget(
    tmp_path: Path, budget: int, turns: list[list[int]], ids: list[int], masked: list[Any]
) -> None:
    fake = FakeServer()
    fake.ids = follow(turns)
    settings = one_prompt(thinking={"budget": budget})
    thinking = replace(CLOSING, budget=budget)
    async with talking(tmp_path, fake, thinking=thinking, settings=settings) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        check_accounting(batch, controller, fake)
        ref = batch.samples[0]
        stored, start, logprobs = controller._store.read(ref)
    assert stored[start:].tolist() == ids
    assert [(span.start, span.end) for span in ref.masked] == masked
    assert all(span.why == "closing" for span in ref.masked)
    put_in = {place for start, end in masked for place in range(start, end)}
    assert [place for place, value in enumerate(logprobs) if value == 0] == sorted(put_in)
    assert batch.measures["thinking_closed"] == len(masked)
    assert fake.bodies[0]["sampling_params"]["max_tokens"] == budget, "the budget ends the first request"


def test_a_prompt_that_closes_the_thinking_leaves_nothing_to_close() -> None:
    generation = Generation(make_prompt(0, (1, END)), 0)
    generation.extend([5] * 5, [-0.5] * 5, 0)
    assert CLOSING.left(generation) is None
    generation.put_in([9], "observation")
    assert CLOSING.left(generation) == 3, "the next turn may think again"
    generation.extend([5], [-0.5], 0)
    assert CLOSING.left(generation) == 2


async def test_every_answer_has_the_limit_of_the_step_that_began_it(tmp_path: Path) -> None:
    stages = [{"until_step": 1, "max_answer_tokens": 4}, {"until_step": 2, "max_answer_tokens": 6}]

    fake = FakeServer()
    fake.ids = lambda body: [5] * 99
    settings = recipe(prompts=2, length_stages=stages, max_staleness=1, over_provision=0.5)
    fake.gate = 3
    async with controlling(tmp_path / "samples", fake, recipe=settings) as controller:
        taking = asyncio.create_task(controller.rollout(RolloutRequest(step=1)))
        while len(fake.bodies) < 8:
            await asyncio.sleep(0.01)
        state = ControllerState.from_json((await controller.state(Empty())).to_json())
        fake.gate = 99
        first = await taking
        set_version(controller, 1, fake)
        second = await controller.rollout(RolloutRequest(step=2))
        assert (
            await controller.evaluate(EvaluationRequest(problems=1, answers=1, temperature=0.0))
        ).mean_length == 12, "evaluations compare over the steps"
    assert {row.answer_length for row in first.samples} == {4}
    assert all(row.limit == row.answer_length for row in [*first.samples, *second.samples])
    lengths = {row.prompt_index: row.answer_length for row in second.samples}
    assert lengths.pop(2) == 4 and set(lengths.values()) == {6}, "prompt 2 was started in the first stage"
    assert (first.measures["answer_limit"], second.measures["answer_limit"]) == (4, 6)
    async with controlling(tmp_path / "samples", fake, recipe=settings) as controller:
        await controller.restore(state)
        set_version(controller, 1, fake)
        again = await controller.rollout(RolloutRequest(step=2))
    assert {row.answer_length for row in again.samples} == {4}, "the limit is carried with the answer"


async def test_an_answer_that_repeats_itself_is_halted_and_counted(tmp_path: Path) -> None:
    fake = FakeServer()
    fake.reason = "repetition"
    settings = one_prompt(repetition_halt={"longest_pattern": 5, "times": 4})
    async with controlling(tmp_path, fake, recipe=settings) as controller:
        reasons: list[str] = []
        set_scorer(controller, lambda problem, text, reason: reasons.append(reason) or 1.0)
        batch = await controller.rollout(RolloutRequest(step=1))
        check_accounting(batch, controller, fake)
    wanted = {"max_pattern_size": 5, "min_count": 4}
    assert fake.bodies[0]["sampling_params"]["repetition_detection"] == wanted
    assert reasons == ["repetition"] * 3 and batch.measures["halted"] == 1.0
    assert batch.measures["truncated"] == 0.0


async def test_the_environment_is_asked_with_the_problem() -> None:
    seen: list[Problem] = []
    partner = Partner()
    partner.ask = lambda *job: seen.append(job[0]) or Partner.ask(partner, *job)  # type: ignore[method-assign]
    generation = Generation(make_prompt(3), 0)
    generation.extend([5, CALL], [-0.5] * 2, 0)
    await EnvironmentPool((CALL,), 1, partner).step(generation)
    assert seen == [generation.prompt.problem]
