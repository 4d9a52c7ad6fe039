"""Routes of a response while it is sampled: on servers that die, through cuts and insertions, and in a checkpoint."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.groups import Group
from gspo_megatron.controller.recorded_routes import RecordedRoutes
from gspo_megatron.controller.scheduler import Scheduler
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.controller.state import describe_groups, read_groups, store_generations
from gspo_megatron.data.store import SampleStore
from gspo_megatron.transport.token_frames import FrameError
from tests.unit.controller.fakes import FakeServer, make_prompt, serving

SAMPLED = Sampling(temperature=0.8, max_tokens=8, stop_ids=(), seed=3, routes=True)


def columns(generation: Generation) -> tuple[list[int], list[int]]:
    """Positions and marks of the rows."""
    rows = generation.routes.copy()
    return ([], []) if rows is None else (rows[:, 0, 0].tolist(), rows[:, 1, 0].tolist())


async def test_a_lost_server_takes_no_route_with_it() -> None:
    """What the first one sent is kept as it was, and the second one goes on behind it."""
    first, second = FakeServer(), FakeServer()
    first.break_off_at, first.mark, second.mark = 3, 1, 2
    first.length = second.length = lambda body: 8
    async with serving(first, second) as clients:
        scheduler = Scheduler(ServerSet(clients), lambda: 0)
        generation = Generation(make_prompt(0), 0)
        assert await scheduler.complete(generation, SAMPLED) == "length"
    assert [server.bodies[0]["sampling_params"]["routed_experts_prompt_start"] for server in (first, second)] == [0, 5]
    assert len(generation) == 8
    assert columns(generation) == ([*range(10)], [1] * 5 + [2] * 5)


async def test_tokens_of_an_unfinished_update_take_their_routes_with_them() -> None:
    fake = FakeServer()
    fake.length, fake.break_off_at = (lambda body: 8), 5
    async with serving(fake) as [client]:
        generation = Generation(make_prompt(0), 0)
        version = lambda: 0 if len(generation) < 3 else None  # noqa: E731
        with pytest.raises(ServerError):
            await client.generate(generation, SAMPLED, version)
    assert len(generation) == 2 and columns(generation)[0] == [*range(4)]


async def test_a_server_that_sends_too_few_or_none_is_a_fault() -> None:
    fake = FakeServer()
    async with serving(fake) as [client]:
        generation = Generation(make_prompt(0), 0)
        generation.routes.extend(np.zeros((1, 5, 2), np.uint8))
        with pytest.raises(ServerError, match=r"routes of \(2, 1\) uint8 follow some of \(5, 2\) uint8"):
            await client.generate(generation, SAMPLED, lambda: 0)
        silent = Generation(make_prompt(0), 1)
        silent.extend([7], [-0.5], 0)
        with pytest.raises(ServerError, match="sent routes of 0 tokens instead of 3"):
            client._check_routes(silent, SAMPLED, 0)


def test_rows_stay_those_of_their_tokens() -> None:
    """However tokens are sampled, put in, cut, abandoned and started anew under another prompt."""
    for number in range(int(os.environ.get("GSPO_FUZZ", "1000")) // 10):
        draw = random.Random(number)
        generation, mark = Generation(make_prompt(0, range(draw.randint(1, 4))), 0), 0
        for _ in range(draw.randint(1, 12)):
            sampled = bool(generation.segments)
            match draw.choice(["sample", "sample", "put in", "cut", "abandon", "anew"]):
                case "sample":
                    count = draw.randint(1, 5)
                    known, until = len(generation.routes), len(generation.request_ids) + count - 1
                    rows = [[[place], [generation.prompt.index]] for place in range(known, until)]
                    generation.routes.extend(np.array(rows, np.uint8))
                    generation.extend([5] * count, [-1.0] * count, mark)
                case "put in" if sampled:
                    generation.put_in([9] * draw.randint(0, 3), "observation")
                case "cut":
                    generation.cut(draw.randint(0, len(generation)))
                case "abandon":
                    generation.abandon(draw.randint(0, len(generation)))
                case "anew":
                    mark += 1
                    generation.prompt = make_prompt(mark, range(draw.randint(1, 4)))
                    generation.abandon(0)
                case _:
                    pass
            places, marks = columns(generation)
            assert places == [*range(len(places))] and set(marks) <= {generation.prompt.index}, number
            assert len(places) <= max(0, len(generation.request_ids) - 1), number


def test_routes_of_unfinished_responses_are_in_a_checkpoint(tmp_path: Path) -> None:
    generation = Generation(make_prompt(3), 0)
    generation.extend([5, 6, 7], [-1.0] * 3, 0)
    generation.routes.extend(np.arange(20, dtype=np.uint8).reshape(5, 2, 2))
    states, responses = describe_groups([Group(generation.prompt, [generation])])
    generation.routes.extend(np.zeros((1, 2, 2), np.uint8))  # it goes on while the copy is written
    store = SampleStore(tmp_path)
    [group] = read_groups(states, store_generations(responses, store), store)
    found = group.generations[0].routes
    rows = found.copy()
    assert rows is not None and np.array_equal(rows, np.arange(20).reshape(5, 2, 2))
    found.extend(np.ones((1, 2, 2), np.uint8))
    assert len(found) == 6


def test_rows_of_another_model_are_refused() -> None:
    routes = RecordedRoutes()
    routes.extend(np.zeros((1, 2, 2), np.uint8))
    for wrong in (np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 2), np.uint16)):
        with pytest.raises(FrameError, match="a response is sampled by one model"):
            routes.extend(wrong)
