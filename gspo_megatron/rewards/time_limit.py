"""A limit of processor time around a piece of work in the main thread, with a backstop by the clock."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

BACKSTOP = 20
"""Times the limit that may pass by the clock: on a busy machine a process gets only a share of a core."""

AGAIN_SECONDS = 1.0


class OutOfTime(BaseException):
    """The work took too long. No `Exception`, so that no library around the work takes it for its own."""


def check_main_thread() -> None:
    """Raise RuntimeError outside the main thread: limits of processor time are signals, which only it receives."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a limit of processor time needs the main thread of its process; score in a process pool")


@contextmanager
def limit_time(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise OutOfTime within the block after some seconds of processor time, or BACKSTOP times that by the clock.

    Yields a function that starts the count again.

    Signals reach Python code only: one long call of a C library ends first. Only the main thread receives them.

    Raises:
        RuntimeError: called in another thread.
    """
    check_main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"took more than {seconds:g} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, BACKSTOP * seconds))
    before = [signal.signal(number, stop) for number, _, _ in timers]

    def start() -> None:
        for _, timer, limit in timers:
            # Again and again: a library may take the first one for an error of its own.
            signal.setitimer(timer, limit, AGAIN_SECONDS)

    try:
        start()
        yield start
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
