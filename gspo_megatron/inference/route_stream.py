"""Routes on their way out of a server: binary, and with the tokens that they belong to.

vllm 0.32 keeps the routes of a request until it ends and puts them into its last message as base64. That is a third
more, twice copied, and all of it is gone with a server that dies before. Here each message of a stream is preceded by
the rows that have come since the last one (`transport/route_frames.py`), for requests that say so in their header.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import numpy as np

from gspo_megatron.transport.auth import App, Receive, Scope, Send
from gspo_megatron.transport.route_frames import HEADER, write_frame
from gspo_megatron.transport.server_paths import GENERATE

_rows: ContextVar[list[np.ndarray] | None] = ContextVar("routes of the response that this task makes", default=None)


class RouteStream:
    """ASGI middleware for vLLM's server, and what it changes in vLLM's own code."""

    def __init__(self, app: App) -> None:
        self.app = app
        hand_over_rows()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = scope["type"] == "http" and scope["path"] == GENERATE
        if not is_asked or HEADER.encode() not in dict(scope["headers"]):
            await self.app(scope, receive, send)
            return
        rows: list[np.ndarray] = []
        _rows.set(rows)

        async def send_with_rows(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and rows:
                frame = write_frame(np.concatenate(rows))
                rows.clear()
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send(message)

        await self.app(scope, receive, send_with_rows)


def hand_over_rows() -> None:
    """Have vLLM give the rows of a request to its response whenever it makes a message of it, and not as base64.

    A message holds the request's own list of rows, and whoever writes the message empties it: messages that vLLM joins
    because their reader is slow lose none.
    """
    from vllm.entrypoints.scale_out.token_in_token_out import serving
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.output_processor import RequestState

    make_output, write_base64 = RequestState._new_completion_output, serving.numpy2base64

    def make_output_with_rows(self: RequestState, *args: Any, **kwargs: Any) -> CompletionOutput:
        output = make_output(self, *args, **kwargs)
        output.routed_experts = self.routed_experts_chunks or None  # type: ignore[assignment]
        return output

    def take_rows(values: Any) -> str | None:
        if not isinstance(values, list):
            return write_base64(values)
        kept = _rows.get()
        if kept is not None:
            kept.extend(values)
        values.clear()
        return None

    RequestState._new_completion_output = make_output_with_rows
    serving.numpy2base64 = take_rows  # type: ignore[assignment]
