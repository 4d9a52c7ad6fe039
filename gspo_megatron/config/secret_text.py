"""Text without secrets: errors of a library may quote the key or the address that it was given."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""Names of environment variables that may hold a secret."""
_USER = re.compile(r"://[^/@\s]+@")
_SHORTEST = 6


_DRAIN_SECONDS = 1.0
"""Longest wait for what is still in the pipe; a process that was left behind may keep it open."""


@contextlib.contextmanager
def hidden_output() -> Iterator[None]:
    """Pass on without secrets what this process writes within, and what the processes do that it starts.

    It acts on the descriptors 1 and 2, which those inherit: a library's or a subprocess's own text is no string here.
    """
    try:
        kept = [os.dup(number) for number in (1, 2)]
    except OSError:  # a process without output
        yield
        return
    readers = [_pass_on(number, target) for number, target in zip((1, 2), kept, strict=True)]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        for number, target in zip((1, 2), kept, strict=True):
            os.dup2(target, number)
        for reader in readers:
            reader.join(_DRAIN_SECONDS)


def _pass_on(number: int, target: int) -> threading.Thread:
    """Lead a descriptor into a thread that writes its lines, without secrets, where the descriptor led to before."""
    source, into = os.pipe()
    os.dup2(into, number)
    os.close(into)

    def run() -> None:
        with os.fdopen(source, "rb") as lines, os.fdopen(target, "wb", buffering=0) as out:
            for line in lines:
                with contextlib.suppress(OSError):
                    out.write(hide_secrets(line.decode(errors="surrogateescape")).encode(errors="surrogateescape"))

    thread = threading.Thread(target=run, name="output without secrets", daemon=True)
    thread.start()
    return thread


def hide_secrets(text: str) -> str:
    """Replace the values of such variables, and credentials in addresses, by `***`."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER.sub("://***@", text)
