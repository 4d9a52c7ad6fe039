"""Scoring in processes of its own: an answer whose scorer hangs or dies costs its reward, not the run."""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from gspo_megatron.rollout.processes import die_with_parent
from gspo_megatron.types import Problem, StopReason

Scorer = Callable[[Problem, str, StopReason], float]
MEMORY_BYTES = 8 << 30
"""Address space of a scoring process, its imports included."""
MAX_SENTENCE = 300
"""Characters of a reason; an error may quote the whole answer."""
START_SECONDS = 120.0
"""Time a scoring process has for its imports."""


def _work(make: Callable[[], Scorer], connection: Connection, parent: int) -> None:
    """A scoring process: one job in, one number or one sentence out."""
    die_with_parent(parent)
    scorer = make()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # What a scorer prints would fill the controller's log; that it cannot start is still said there.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    connection.send("ready")
    while True:
        try:
            problem, text, reason = connection.recv()
        except EOFError:
            return
        try:
            reply: float | str = float(scorer(problem, text, reason))
        # A scorer runs over text that a model made up: whatever it raises is a fact about that answer.
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"[:MAX_SENTENCE]
        connection.send(reply)


class _Worker:
    """One scoring process and the pipe to it; started again after it was lost."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._make = make
        self._process: BaseProcess | None = None
        self._connection: Connection

    def score(self, problem: Problem, text: str, reason: StopReason, limit: float) -> float | str:
        """The score, or why there is none."""
        if fault := self.start():
            return fault
        try:
            self._connection.send((problem, text, reason))
            if self._connection.poll(limit):
                return self._connection.recv()
        except (EOFError, OSError):
            self.stop()
            return "its scoring process died"
        self.stop()
        return f"its scorer took more than {limit:g} s"

    def start(self) -> str:
        """Start the process if there is none; why that failed, or an empty text."""
        if self._process is not None:
            return ""
        # Spawned, not forked: the controller holds threads and connections that a child must not inherit.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self._make, theirs, os.getpid()), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            if self._connection.poll(START_SECONDS) and self._connection.recv() == "ready":
                return ""
        except EOFError:
            pass
        self.stop()
        return "the scorer could not be started; its log says why"

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


class ScoringPool:
    """A few scoring processes; `submit` from any thread."""

    def __init__(self, make: Callable[[], Scorer], workers: int, limit: float) -> None:
        """
        Args:
            make: builds the scorer within each process; must be picklable.
            workers: scoring processes.
            limit: seconds that one answer may take.
        """
        self._limit = limit
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(make) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # One thread a process: each waits on its own pipe.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="scoring")

    def start(self) -> None:
        """Start all processes now, in the background; otherwise each starts with its first answer."""
        for _ in self._workers:
            self._threads.submit(self._start_one)

    def submit(self, problem: Problem, text: str, reason: StopReason) -> Future[float | str]:
        """Score one answer; the result is its reward, or a sentence about why it has none."""
        return self._threads.submit(self._score, problem, text, reason)

    def _score(self, problem: Problem, text: str, reason: StopReason) -> float | str:
        worker = self._idle.get()
        try:
            return worker.score(problem, text, reason, self._limit)
        finally:
            self._idle.put(worker)

    def _start_one(self) -> None:
        worker = self._idle.get()
        try:
            worker.start()
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all scoring processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()
        for worker in self._workers:  # one that was being started meanwhile
            worker.stop()
