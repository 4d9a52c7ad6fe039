"""Files that another node replaces while this one reads them. Standard library of Python 3.9: a batch node reads it."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Callable, TypeVar

T = TypeVar("T")
TRIES = 5
PAUSE_SECONDS = 0.2


def retry_stale(ask: Callable[[], T]) -> T:
    """The answer of a file operation, asked again while the file system says ESTALE.

    NFS says so once of a file or a directory that another node has replaced.

    Raises:
        OSError: any other error, or still the same.
    """
    for _ in range(TRIES - 1):
        try:
            return ask()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(PAUSE_SECONDS)
    return ask()


def read_shared(path: Path) -> str:
    """The text of a file that another node may replace."""
    return retry_stale(lambda: path.read_text(errors="replace"))


def replace_text(path: Path, text: str) -> None:
    """Write a file that readers see whole, before or after; nodes that write it at once do not disturb each other."""
    fresh = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    fresh.write_text(text)
    retry_stale(lambda: fresh.replace(path))
