"""One process with an event loop, for a function that waits: an LLM judge answers many responses at a time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from typing import Any

from gspo_megatron.controller.process_pool import (
    LOOK_SECONDS,
    READY,
    Lost,
    Worker,
    describe_error,
    enter_process,
    pack_reply,
    unpack_reply,
)
from gspo_megatron.rewards.time_limit import BACKSTOP, limit_time

AT_ONCE = 64
"""Jobs that the process works on, unless said otherwise; the others wait, and their time does not count."""
BEAT_SECONDS = 1.0
"""How often the process says that its event loop runs."""
BEAT = 0
"""Number of a message that only says so."""
_OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("owner", default=None)
"""The job that a task belongs to: a task has the context of the one that started it."""


async def run_with_tasks(function: Callable[..., Awaitable[Any]], *job: Any) -> Any:
    """Await a job, and end the tasks that it leaves behind, as `asyncio.run` does at the end of a program."""
    owner = object()
    _OWNER.set(owner)
    try:
        return await function(*job)
    finally:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_context().get(_OWNER) is owner:
                task.cancel()


def _serve(
    limit: float,
    wall: float,
    make: Callable[[], Callable[..., Awaitable[Any]]],
    connection: Connection,
    parent: int,
) -> None:
    """The process: numbered jobs in, numbered results out, in any order."""
    function = enter_process(make, parent)
    connection.send(READY)
    asyncio.run(_serve_jobs(limit, wall, function, connection))


async def _serve_jobs(
    limit: float, wall: float, function: Callable[..., Awaitable[Any]], connection: Connection
) -> None:
    loop, ended, tasks = asyncio.get_running_loop(), asyncio.Event(), dict[int, asyncio.Task[None]]()

    async def run(number: int, job: tuple[Any, ...]) -> None:
        clock = asyncio.timeout(None if math.isinf(wall) else wall)
        try:
            async with clock:
                reply = await run_with_tasks(function, *job)
        # It runs over text that a model made up: whatever it raises, SystemExit included, is a fact about that answer.
        except BaseException as error:
            late = isinstance(error, TimeoutError) and clock.expired()
            reply = Lost("out-of-time", f"took more than {wall:g} s") if late else describe_error(error)
        connection.send((number, pack_reply(reply)))

    def read() -> None:
        try:
            while connection.poll():
                number, job = connection.recv()
                if job is not None:
                    tasks[number] = loop.create_task(run(number, job))
                    tasks[number].add_done_callback(lambda _, number=number: tasks.pop(number))
                elif number in tasks:
                    tasks[number].cancel()
        except EOFError:
            loop.remove_reader(connection.fileno())
            ended.set()

    loop.add_reader(connection.fileno(), read)
    # What computes without an await for too long is interrupted, and only that job.
    said = loop.time()
    with limit_time(limit) as restart:
        while not ended.is_set():
            restart()
            if loop.time() - said > BEAT_SECONDS:
                said = loop.time()
                connection.send((BEAT, None))
            await asyncio.sleep(min(LOOK_SECONDS, limit / 4))


class LoopPool:
    """One process that works on many jobs; ask from any thread."""

    def __init__(
        self,
        make: Callable[[], Callable[..., Awaitable[Any]]],
        limit: float,
        what: str,
        at_once: int = AT_ONCE,
        patience: float = 0.0,
    ) -> None:
        """
        Args:
            make: builds the asynchronous function within the process; must be picklable.
            limit: seconds of processor time that a job may take at a stretch; BACKSTOP times that it may take in all.
            what: the function in one word, for sentences about it.
            at_once: jobs that the process works on.
            patience: seconds more that a job may take in all, because it waits for others; endless = `cancel` ends it.
        """
        self._limit, self._wall = limit, BACKSTOP * limit + patience
        self._what, self._at_once = what, at_once
        self._worker = Worker(make, what, functools.partial(_serve, limit, self._wall))
        self._jobs: deque[tuple[Future[Any], tuple[Any, ...]]] = deque()
        self._cancelled: deque[Future[Any]] = deque()
        self._running: dict[int, Future[Any]] = {}
        """Results by number."""
        self._heard = time.monotonic()
        """When the process last sent something."""
        self._sent = 0
        self._closed = False
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)

    def start(self) -> None:
        """Start the process now, in the background."""
        if not self._thread.is_alive():
            self._thread.start()

    def ask(self, *job: Any) -> Future[Any]:
        """Run one job; what the function returned, or a `Lost`."""
        future: Future[Any] = Future()
        self._jobs.append((future, job))
        self.start()
        self._ring.send_bytes(b"1")
        return future

    def cancel(self, future: Future[Any]) -> None:
        """End a job that `ask` began; what it raises then is its result."""
        if not future.cancel():
            self._cancelled.append(future)
            self._ring.send_bytes(b"1")

    def close(self) -> None:
        """End the process."""
        self._closed = True
        if self._thread.is_alive():
            self._ring.send_bytes(b"1")
            self._worker.kill()
            self._thread.join()
        self._worker.stop()
        self._bell.close()
        self._ring.close()

    def _start(self) -> str:
        """Start the process; why that failed, or an empty text."""
        fault = self._worker.start()
        self._heard = time.monotonic()
        return fault

    def _run(self) -> None:
        fault = self._start()
        while not self._closed:
            if not fault:
                self._send()
            elif self._jobs:
                fault = self._start()
                self._lose_waiting(fault)
                continue
            ready = wait([self._bell] if fault else [self._bell, self._worker.connection], LOOK_SECONDS)
            while self._bell in ready and self._bell.poll():
                self._bell.recv_bytes()
            if not fault and (kind := self._receive()):
                self._lose_running(kind)
                fault = self._start()

    def _send(self) -> None:
        # Where it died, the end of its pipe is found next.
        with contextlib.suppress(OSError):
            while self._cancelled:
                future = self._cancelled.popleft()
                for number in [number for number, one in self._running.items() if one is future]:
                    self._worker.connection.send((number, None))
            while self._jobs and len(self._running) < self._at_once:
                future, job = self._jobs.popleft()
                if future.set_running_or_notify_cancel():
                    self._sent += 1
                    self._running[self._sent] = future
                    self._worker.connection.send((self._sent, job))

    def _receive(self) -> str:
        """Take what has come; the kind of fault for which the process must be started again, or an empty text."""
        try:
            while self._worker.connection.poll():
                number, reply = self._worker.connection.recv()
                self._heard = time.monotonic()
                if number != BEAT:
                    self._running.pop(number).set_result(unpack_reply(reply))
        except (EOFError, OSError):
            return "died"
        if not self._running:
            self._heard = time.monotonic()
        # Beyond the time that the process allows itself: it is held up where no signal is seen.
        return "out-of-time" if time.monotonic() - self._heard > 2 * BACKSTOP * self._limit else ""

    def _lose_running(self, kind: str) -> None:
        self._worker.stop()
        for future in self._running.values():
            future.set_result(Lost(kind, f"its {self._what}'s process died" if kind == "died" else "took too long"))
        self._running.clear()
        self._heard = time.monotonic()

    def _lose_waiting(self, fault: str) -> None:
        while fault and self._jobs:
            future, _ = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                future.set_result(Lost("not-started", fault))
