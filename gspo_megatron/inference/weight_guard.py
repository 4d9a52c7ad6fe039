"""Nothing is sampled by a server that was never given weights.

One that is lost and started again between two requests is the same address, with random weights: the next request for
samples must find that out, whoever sends it.
"""

from __future__ import annotations

import os

from gspo_megatron.transport.auth import App, Receive, Scope, Send, refuse
from gspo_megatron.transport.server_paths import FINISH_UPDATE, GENERATE

LOADED_VARIABLE = "GSPO_SERVES_FILES"
"""Set by a server that has loaded its weights from files."""
REFUSAL = "this server has no weights: it was started after the last update"


class WeightGuard:
    """ASGI middleware for vLLM's server."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._has_weights = LOADED_VARIABLE in os.environ

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""

        async def look(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._has_weights = True
            await send(message)

        if path == GENERATE and not self._has_weights:
            await refuse(send, 409, REFUSAL)
        else:
            await self.app(scope, receive, look if path == FINISH_UPDATE else send)
