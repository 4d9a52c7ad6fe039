"""Processes that die with the one that started them, however that one dies."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends.

    Args:
        parent: process id that the parent had when it started this one; a parent that died before the call is noticed
            by it. None = only an orphan (adopted by process 1) is noticed.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    now = os.getppid()
    if now != parent if parent is not None else now == 1 and os.getpid() != 1:
        os._exit(1)


def hear_of_ends() -> None:
    """Receive the exit codes of children. A parent that ignored SIGCHLD hands that on, and each would be 0."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def bind_forked_children() -> None:
    """Let every process forked from this one, and from those, die with its own parent."""
    parents: list[int] = []

    def remember() -> None:
        parents[:] = [os.getpid()]

    def bind() -> None:
        die_with_parent(parents[0])

    os.register_at_fork(before=remember, after_in_child=bind)
