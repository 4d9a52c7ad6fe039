"""Whether a process still runs, for tests that end some."""

from __future__ import annotations

import psutil


def runs(pid: int) -> bool:
    """Whether it is neither gone nor dead and waiting for a parent to notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
