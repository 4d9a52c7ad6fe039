"""Scoring processes: numbers come back, whatever hangs, dies or raises costs one answer its reward."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from gspo_megatron.controller.process_pool import Lost, ProcessPool
from gspo_megatron.types import Problem

PROBLEM = Problem("p", "q", {"answer": "3"})


def act(problem: Problem, text: str, reason: str) -> float:
    if text == "hang":
        time.sleep(600)
    if text == "spin":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM])
        while True:
            pass
    if text == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "print":
        for _ in range(1000):
            print("x" * 1_000_000, flush=True)
    if text == "grow":
        bytearray(20 << 30)
    if text == "quote":
        raise ValueError("x" * 1_000_000)
    if text == "raise":
        raise ZeroDivisionError("nothing to divide")
    return float(text == problem.line["answer"] and reason == "stop")


def show(result: Any) -> Any:
    return f"{result.kind}: {result.why}" if isinstance(result, Lost) else result


def make() -> Any:
    return act


def make_nothing() -> Any:
    raise SystemExit("no scorer today")


@pytest.fixture
def start() -> Iterator[Callable[..., ProcessPool]]:
    pools = []

    def begin(make: Callable[[], Any], workers: int, limit: float) -> ProcessPool:
        pools.append(ProcessPool(make, workers, limit, "scorer"))
        return pools[-1]

    yield begin
    for pool in pools:
        pool.close()
    assert multiprocessing.active_children() == []


def test_one_bad_answer_costs_only_its_own_reward(start: Callable[..., ProcessPool]) -> None:
    pool = start(make, 1, 0.2)
    pool.start()
    texts = ["3", "hang", "3", "die", "spin", "raise", "4", "3"]
    results = [pool.ask(PROBLEM, text, "stop") for text in texts]
    assert [show(result.result(120)) for result in results] == [
        1.0,
        "out-of-time: its scorer took more than 0.2 s",
        1.0,
        "died: its scorer's process died",
        "out-of-time: its scorer took more than 0.2 s",
        "raised: ZeroDivisionError: nothing to divide",
        0.0,
        1.0,
    ]
    assert pool.ask(PROBLEM, "3", "length").result(60) == 0.0


def test_output_memory_and_words_are_bounded(
    start: Callable[..., ProcessPool], capfd: pytest.CaptureFixture[str]
) -> None:
    pool = start(make, 1, 20.0)
    printed, grown, quoted = [pool.ask(PROBLEM, text, "stop").result(120) for text in ("print", "grow", "quote")]
    assert printed == 0.0 and grown.why == "MemoryError:"
    assert quoted.why == ("ValueError: " + "x" * 1_000_000)[:300] and len(quoted.trace) <= 3000
    assert capfd.readouterr() == ("", ""), "a gigabyte in the controller's log"


@pytest.mark.parametrize("waits_for", ["a start", "an answer"])
def test_a_pool_that_is_closed_while_a_thread_waits_closes_each_pipe_once(
    start: Callable[..., ProcessPool], waits_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    close = Connection.close

    def note(connection: Connection) -> None:
        closed.append(id(connection))
        time.sleep(0.2)  # long enough for another thread to come by
        close(connection)

    pool = start(make, 1, 60.0)
    if waits_for == "an answer":
        assert pool.ask(PROBLEM, "3", "stop").result(60) == 1.0
        pool.ask(PROBLEM, "hang", "stop")
    else:
        pool.start()
    while not multiprocessing.active_children():
        time.sleep(0.01)
    time.sleep(0.3)
    monkeypatch.setattr(Connection, "close", note)
    pool.close()
    assert len(closed) == len(set(closed)) == 1


def test_a_scorer_that_cannot_start_is_a_sentence(start: Callable[..., ProcessPool]) -> None:
    pool = start(make_nothing, 1, 1.0)
    lost = pool.ask(PROBLEM, "3", "stop").result(60)
    assert show(lost) == "not-started: the scorer could not be started; its log says why"
