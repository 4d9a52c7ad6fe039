"""Work over what a model wrote, in processes of its own: what hangs or dies costs one answer, not the run."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import resource
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.child_processes import die_with_parent

Function = Callable[..., Any]
"""What a process computes; returns anything that can be pickled, but no text."""
MEMORY_BYTES = 8 << 30
"""Address space of a process, its imports included."""
MAX_SENTENCE = 300
"""Characters of a reason; an error may quote the whole answer."""
START_SECONDS = 120.0
"""Time a process has for its imports."""
PATIENCE = 20
"""A job may take so many times its limit by the clock, as long as it has not worked for as long as the limit: on a
busy machine a process gets only a share of a core, and starting it again would make the machine busier."""
LOOK_SECONDS = 0.25
"""How often its working time is looked at."""


def _work(make: Callable[[], Function], connection: Connection, parent: int) -> None:
    """A process: one job in, one result or one sentence out."""
    die_with_parent(parent)
    function = make()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # What is printed on the way would fill the controller's log; an error at its start still goes there.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            reply = function(*job)
        # It runs over text that a model made up: whatever it raises, SystemExit included, is a fact about that answer.
        except BaseException as error:
            reply = f"{type(error).__name__}: {error}"[:MAX_SENTENCE]
        connection.send(reply)


class _Worker:
    """One process and the pipe to it; started again after it was lost."""

    def __init__(self, make: Callable[[], Function], what: str) -> None:
        self._make, self._what = make, what
        self._process: BaseProcess | None = None
        self._connection: Connection

    def run(self, job: tuple[Any, ...], limit: float) -> Any:
        """The result, or a sentence about why there is none."""
        if fault := self.start():
            return fault
        try:
            self._connection.send(job)
            if self._answers_within(limit):
                return self._connection.recv()
        except (EOFError, OSError):
            self.stop()
            return f"its {self._what}'s process died"
        self.stop()
        return f"its {self._what} took more than {limit:g} s"

    def _answers_within(self, limit: float) -> bool:
        """Whether there is a reply before the limit: of working time, or PATIENCE times that by the clock."""
        assert self._process is not None and self._process.pid is not None
        deadline, worked = time.monotonic() + PATIENCE * limit, working_seconds(self._process.pid)
        while not self._connection.poll(min(LOOK_SECONDS, limit)):
            if time.monotonic() > deadline or working_seconds(self._process.pid) - worked > limit:
                return self._connection.poll()
        return True

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
        return f"the {self._what} could not be started; its log says why"

    def kill(self) -> None:
        """End the process, from any thread; the one that waits for it finds its pipe broken and closes it."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process and its pipe; only while no other thread waits for it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def working_seconds(pid: int) -> float:
    """Processor time of a process and of its ended children; endless for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


class ProcessPool:
    """A few processes of one function; ask from any thread."""

    def __init__(self, make: Callable[[], Function], workers: int, limit: float, what: str) -> None:
        """
        Args:
            make: builds the function within each process; must be picklable.
            workers: processes.
            limit: seconds that one job may work.
            what: the function in one word, for sentences about it.
        """
        self._limit = limit
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(make, what) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # One thread a process: each waits on its own pipe.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=what)

    def start(self) -> None:
        """Start all processes now, in the background; otherwise each starts with its first job."""
        for _ in self._workers:
            self._threads.submit(self._start_one)

    def ask(self, *job: Any) -> Future[Any]:
        """Run one job; what the function returned, or a sentence about why there is nothing."""
        return self._threads.submit(self._run, *job)

    def _run(self, *job: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.run(job, self._limit)
        finally:
            self._idle.put(worker)

    def _start_one(self) -> None:
        worker = self._idle.get()
        try:
            worker.start()
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown()
        for worker in self._workers:
            worker.stop()
