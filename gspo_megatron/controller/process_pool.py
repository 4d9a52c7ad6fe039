"""Work over what a model wrote, in processes of its own: what hangs or dies costs one answer, not the run."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import queue
import resource
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.config.plugins import error_text
from gspo_megatron.config.secret_text import hide_secrets
from gspo_megatron.rewards.time_limit import BACKSTOP, OutOfTime

Function = Callable[..., Any]
"""What a process computes; returns anything that can be pickled."""
READY = "ready"
"""First message of a process."""
MEMORY_BYTES = 8 << 30
"""Address space of a process, its imports included."""
MAX_SENTENCE, MAX_TRACE = 300, 3000
"""Characters of a reason and of a stack; an error may quote the whole answer."""
START_SECONDS = 120.0
"""Time a process has for its imports."""
LOOK_SECONDS = 0.25
"""How often its working time is looked at."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A job without a result."""

    kind: str
    """`raised`, `out-of-time`, `died` or `not-started`."""
    why: str
    """One sentence."""
    trace: str = ""
    """The stack of what was raised."""


def describe_error(error: BaseException) -> Lost:
    """What a job raised, as its process reports it."""
    why = " ".join(hide_secrets(error_text(error)).split())[:MAX_SENTENCE]
    if isinstance(error, OutOfTime):
        return Lost("out-of-time", str(error))
    # The innermost calls say where; the outermost are this file's.
    return Lost("raised", why, hide_secrets("".join(traceback.format_exception(error)))[-MAX_TRACE:])


def pack_reply(reply: Any) -> bytes:
    """What a job returned, for the way between two processes; where that cannot be, the `Lost` that says so."""
    try:
        return bytes(ForkingPickler.dumps(reply))
    # An object of the user's own may raise anything.
    except Exception as error:
        lost = describe_error(error)
        return bytes(ForkingPickler.dumps(replace(lost, why=f"it returned a {type(reply).__name__}: {lost.why}")))


def unpack_reply(packed: bytes) -> Any:
    """The reply of `pack_reply`; a `Lost` for an object whose class only the other process has."""
    try:
        return pickle.loads(packed)
    # Its class is the user's own, and reading it runs their code.
    except Exception as error:
        return Lost("raised", f"it returned an object that cannot be read outside its process: {error_text(error)}")


def enter_process(make: Callable[[], Function], parent: int) -> Function:
    """Begin a process of a pool: it ends with its parent, has MEMORY_BYTES, and prints nothing but errors of `make`."""
    die_with_parent(parent)
    function = make()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # What is printed on the way would fill the controller's log.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return function


def _work(make: Callable[[], Function], connection: Connection, parent: int) -> None:
    """A process: one job in, one result or one `Lost` out."""
    function = enter_process(make, parent)
    connection.send(READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            reply = function(*job)
        # It runs over text that a model made up: whatever it raises, SystemExit included, is a fact about that answer.
        except BaseException as error:
            reply = describe_error(error)
        connection.send_bytes(pack_reply(reply))


class Worker:
    """One process and the pipe to it; started again after it was lost."""

    def __init__(self, make: Callable[[], Function], what: str, target: Callable[..., None] = _work) -> None:
        """
        Args:
            make: as `ProcessPool`.
            what: as `ProcessPool`.
            target: what the process runs: `target(make, connection, parent)`, which sends READY first.
        """
        self._make, self._what, self._target = make, what, target
        self._process: BaseProcess | None = None
        self.connection: Connection

    def run(self, job: tuple[Any, ...], limit: float) -> Any:
        """The result, or a `Lost`."""
        if fault := self.start():
            return Lost("not-started", fault)
        try:
            self.connection.send(job)
            if self._answers_within(limit):
                return unpack_reply(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.stop()
            return Lost("died", f"its {self._what}'s process died")
        self.stop()
        return Lost("out-of-time", f"its {self._what} took more than {limit:g} s")

    def _answers_within(self, limit: float) -> bool:
        """Whether there is a reply before the limit: of working time, or BACKSTOP times that by the clock."""
        assert self._process is not None and self._process.pid is not None
        deadline, worked = time.monotonic() + BACKSTOP * limit, working_seconds(self._process.pid)
        while not self.connection.poll(min(LOOK_SECONDS, limit)):
            if time.monotonic() > deadline or working_seconds(self._process.pid) - worked > limit:
                return self.connection.poll()
        return True

    def start(self) -> str:
        """Start the process if there is none; why that failed, or an empty text."""
        if self._process is not None:
            return ""
        # Spawned, not forked: the controller holds threads and connections that a child must not inherit.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=self._target, args=(self._make, theirs, os.getpid()), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            if self.connection.poll(START_SECONDS) and self.connection.recv() == READY:
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
            self.connection.close()
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
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker(make, what) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # One thread a process: each waits on its own pipe.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=what)

    def start(self) -> None:
        """Start all processes now, in the background; otherwise each starts with its first job."""
        for _ in self._workers:
            self._threads.submit(self._start_one)

    def ask(self, *job: Any) -> Future[Any]:
        """Run one job; what the function returned, or a `Lost`."""
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
