"""A directory for what a server leaves in TMPDIR: sockets and rendezvous files, which vLLM does not delete.

It lies in `$TMPDIR/gspo-USER`, beside the caches of `launch/lib/start.sh`: the one place of ours on a node. It is
deleted when its user ends. One that was killed cannot do that, as at the end of a SLURM step, so the next one on the
machine does: the lock of a directory is free once its user is gone.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"
PREFIX = "server-"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def scratch_directory() -> Iterator[dict[str, str]]:
    """Make one, and delete those of users that are gone.

    Yields:
        The environment of processes that are to use it. What torch compiles stays where it is without it, because the
        next attempt reads it.
    """
    place = Path(tempfile.gettempdir()) / f"gspo-{user_name()}"
    place.mkdir(mode=0o700, exist_ok=True)
    for path in place.glob(f"{PREFIX}*"):
        _delete_if_free(path)
    path, lock = _make(place)
    cache = os.environ.get(CACHE) or str(place / "inductor")
    try:
        yield {"TMPDIR": str(path), "VLLM_RPC_BASE_PATH": str(path), CACHE: cache}
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def user_name() -> str:
    """The user's name; his number in an image that does not know him."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _make(place: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / LOCK).exists():
                return path, lock
        except OSError:
            pass
        # Another user came between the two lines and took it for one that nobody uses.
        os.close(lock)


def _delete_if_free(path: Path) -> None:
    try:
        lock = os.open(path / LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
