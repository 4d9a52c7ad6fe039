"""Who writes a directory of ours: the process that holds the lock on its mark. Standard library of Python 3.9."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO

MARK = ".gspo-megatron.json"
"""File that marks a directory as ours: its kind and, where it is replaced as a whole, its names and files' digests."""


def take_lock(path: Path) -> BinaryIO | None:
    """Take the lock of a directory; closing what is returned, or the end of the process, gives it back.

    Args:
        path: of the directory.

    Returns:
        None on a file system without locks, which knows of no holder.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the directory has no mark, or this user may not write it.
    """
    lock = (path / MARK).open("r+b")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    except OSError:
        lock.close()
        return None
    return lock
