"""Whether a server has served since it was started: one that never did would end in the same way again."""

from __future__ import annotations

import time
from contextlib import suppress
from http.client import HTTPException

from gspo_megatron.http_clients import direct_opener

ASK_SECONDS = 0.5
"""Least seconds between two health checks of a server that starts."""
ANSWER_SECONDS = 1.0
"""Longest wait for the answer."""


class ServerHealth:
    """What is known of one start of a server."""

    def __init__(self, address: str, port: int) -> None:
        """
        Args:
            address: where it listens; IPv6 without brackets.
            port: of its HTTP interface.
        """
        host = f"[{address}]" if ":" in address else address
        self._url = f"http://{host}:{port}/health"
        self._ask_at = 0.0
        self.served = False

    def look(self) -> None:
        """Ask the server, unless it has served or was asked a moment ago."""
        if self.served or time.monotonic() < self._ask_at:
            return
        with suppress(OSError, HTTPException), direct_opener().open(self._url, timeout=ANSWER_SECONDS) as answer:
            self.served = answer.status == 200
        self._ask_at = time.monotonic() + ASK_SECONDS
