"""The process of an awaited reward: many jobs at a time; what hangs, spins, raises or dies costs itself."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gspo_megatron.controller.loop_pool import AT_ONCE, LoopPool
from gspo_megatron.controller.process_pool import Lost
from tests.waiting import wait_until


class Meeting:
    """Returns when so many jobs have come in."""

    def __init__(self) -> None:
        self.here, self.all_here = 0, asyncio.Event()

    async def __call__(self, text: str, count: int = 0) -> Any:
        if text == "meet":
            self.here += 1
            if self.here == count:
                self.all_here.set()
            await self.all_here.wait()
        if text == "hang":
            await asyncio.sleep(600)
        if text == "spin":
            while True:
                pass
        if text == "sleep":
            time.sleep(600)
        if text == "raise":
            raise ZeroDivisionError("nothing to divide")
        if text == "exit":
            raise SystemExit(3)
        if text == "unsayable":
            raise Unsayable
        if text == "unsendable":
            return lambda: text
        if text == "leave":
            self.left = asyncio.create_task(asyncio.sleep(600))
            await asyncio.sleep(0)
        if text == "left":
            await asyncio.sleep(0)
            return str(self.left.cancelled())
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return text


class Unsayable(Exception):
    """Its text cannot be made, as where a library's error formats what it has not."""

    def __str__(self) -> str:
        raise KeyError("reason")


def make_nothing() -> Any:
    raise SystemExit("no judge today")


@pytest.fixture
def start() -> Iterator[Callable[..., LoopPool]]:
    pools: list[LoopPool] = []

    def begin(make: Callable[[], Any] = Meeting, limit: float = 0.2) -> LoopPool:
        pools.append(LoopPool(make, limit, "scorer"))
        return pools[-1]

    yield begin
    for pool in pools:
        pool.close()
    assert multiprocessing.active_children() == []


def show(result: Any) -> Any:
    return f"{result.kind}: {result.why}" if isinstance(result, Lost) else result


def test_jobs_run_at_the_same_time(start: Callable[..., LoopPool]) -> None:
    pool = start(limit=10.0)
    assert [job.result(60) for job in [pool.ask("meet", AT_ONCE) for _ in range(AT_ONCE)]] == ["meet"] * AT_ONCE
    many = [pool.ask("a") for _ in range(5 * AT_ONCE)]
    assert [job.result(60) for job in many] == ["a"] * len(many)


def test_one_bad_job_costs_only_itself(start: Callable[..., LoopPool]) -> None:
    pool = start()
    assert pool.ask("a").result(60) == "a"
    results = [pool.ask(text) for text in ("hang", "b", "raise", "exit", "spin", "sleep", "c")]
    assert [show(result.result(60)) for result in results] == [
        "out-of-time: took more than 4 s",
        "b",
        "raised: ZeroDivisionError: nothing to divide",
        "raised: SystemExit: 3",
        "out-of-time: took more than 0.2 s",
        "out-of-time: took more than 0.2 s",
        "c",
    ]
    assert show(pool.ask("die").result(60)) == "died: its scorer's process died"
    assert pool.ask("d").result(60) == "d"


def test_what_cannot_be_said_or_sent_is_a_fault_of_its_job(start: Callable[..., LoopPool]) -> None:
    """Else nobody would send a reply, and the run would wait for it for ever."""
    pool = start(limit=10.0)
    jobs = [pool.ask(text) for text in ("unsayable", "unsendable", "a")]
    said = [show(job.result(60)) for job in jobs]
    assert said[0] == "raised: Unsayable: (its text raises KeyError)"
    assert said[1].startswith("raised: it returned a function: ") and said[2] == "a"


def test_tasks_that_a_job_leaves_end_with_it(start: Callable[..., LoopPool]) -> None:
    pool = start(limit=10.0)
    assert pool.ask("leave").result(60) == "leave"
    assert pool.ask("left").result(60) == "True"


def test_a_judge_that_cannot_start_is_a_sentence(start: Callable[..., LoopPool]) -> None:
    pool = start(make_nothing)
    lost = [pool.ask("a"), pool.ask("b")]
    assert {show(one.result(60)) for one in lost} == {"not-started: the scorer could not be started; its log says why"}


def test_a_pool_is_closed_with_jobs_in_it(start: Callable[..., LoopPool]) -> None:
    pool = start(limit=60.0)
    assert pool.ask("a").result(60) == "a"
    pool.ask("hang")


def test_a_process_that_is_started_late_is_not_late_with_its_first_job(
    start: Callable[..., LoopPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first start fails, as on a busy machine; the time until the first job is not the job's."""
    pool = start(limit=10.0)
    real, failures = pool._worker.start, iter(["too busy"])
    monkeypatch.setattr(pool._worker, "start", lambda: next(failures, "") or real())
    pool._heard -= 1e6
    assert pool.ask("a").result(120) == "a"


def test_a_job_without_a_limit_by_the_clock_is_ended_by_cancel() -> None:
    pool = LoopPool(Meeting, 10.0, "agent", at_once=3, patience=math.inf)
    try:
        hanging, waiting = [pool.ask("hang") for _ in range(3)], pool.ask("a")
        wait_until(lambda: all(job.running() for job in hanging), "three jobs at once")
        assert not waiting.done()
        pool.cancel(hanging[0])
        assert show(hanging[0].result(120)) == "raised: CancelledError:" and waiting.result(120) == "a"
        last = pool.ask("never sent")
        assert last.cancel() or last.result(120) == "never sent"
    finally:
        pool.close()
