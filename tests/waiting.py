"""Wait for an event. The limit only ends a test that hangs; no test asserts that something was quick."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 600.0
"""Seconds after which a wait is taken for a hang, also on a machine with other work."""
PAUSE = 0.02


def wait_until(
    reached: Callable[[], object], what: str, check: Callable[[], None] = lambda: None, limit: float = HANG
) -> None:
    """Poll `reached` until it is true.

    Args:
        reached: the event.
        what: its name, for the message.
        check: called between two looks; raises when the event cannot come any more.
        limit: seconds.

    Raises:
        AssertionError: the event has not come after `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while not reached():
        check()
        assert time.monotonic() < deadline, f"after {limit:g} s there is no {what}"
        time.sleep(PAUSE)
