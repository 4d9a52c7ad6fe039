"""Samples on their way out of a server: many responses in one binary stream, with the experts chosen for them.

vllm 0.32 takes one request and one connection a response, and sends each token as a JSON object. At 500 responses that
took as long as the sampling of a small model, and a whole core of the controller at 100,000 tokens a second. Here one
request asks for as many responses as start together (`transport/token_frames.py`). What the engine hands out in a step
leaves in one message. Each response stays a request of its own to vLLM's engine: it is scheduled, paused and aborted
by itself.

vLLM also keeps the routes of a request until it ends. Here they go with the tokens, so a server that dies takes none.
"""

from __future__ import annotations

import asyncio
import json
import logging
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from gspo_megatron.transport.auth import App, Receive, Scope, Send, refuse
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.token_frames import Frame, FrameError, SamplingRequest, read_requests, write_frame

log = logging.getLogger(__name__)
LOWEST = -9999.0
"""vLLM's own word for a log-prob of minus infinity or NaN, which JSON has not; the controller knows it."""
SCORED = b'{"finish_reason": "stop"}'
"""Ending of a request for the log-probs of its prompt."""


class TokenStream:
    """ASGI middleware for vLLM's server that answers one path, and what it changes in vLLM's own code."""

    def __init__(self, app: App) -> None:
        self.app = app
        hand_over_rows()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != GENERATE:
            await self.app(scope, receive, send)
            return
        try:
            requests = read_requests(await read_body(receive))
        except FrameError as error:
            await refuse(send, 400, str(error))
            return
        await stream_samples(scope["app"].state.engine_client, requests, receive, send)


async def read_body(receive: Receive) -> bytes:
    """The body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def stream_samples(engine: EngineClient, requests: list[SamplingRequest], receive: Receive, send: Send) -> None:
    """Answer with the frames of all requests; those that a client has left are aborted."""
    frames: list[bytes] = []
    ready = asyncio.Event()

    def put(frame: Frame) -> None:
        frames.append(write_frame(frame))
        ready.set()

    async def sample_all() -> None:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                group.create_task(sample(engine, number, request, put))

    sampling = asyncio.create_task(sample_all())
    sampling.add_done_callback(lambda task: ready.set())
    leaving = asyncio.create_task(wait_for_disconnect(receive))
    leaving.add_done_callback(lambda task: sampling.cancel())
    try:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-gspo")]}
        )
        while frames or not sampling.done():
            await ready.wait()
            await asyncio.sleep(0)  # what else the engine has handed out in this step joins the message
            ready.clear()
            body = b"".join(frames)
            frames.clear()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        leaving.cancel()
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def sample(engine: EngineClient, number: int, request: SamplingRequest, put: Callable[[Frame], None]) -> None:
    """Sample one response to its end; whatever goes wrong is its ending."""
    try:
        parameters = read_parameters(request)
        prompt = tokens_input(request.token_ids.tolist())
        async for output in engine.generate(prompt, parameters, request.request_id):
            if parameters.prompt_logprobs is not None:
                put(Frame(number, logprobs=first_of_each(output.prompt_logprobs, 1), ending=SCORED))
            else:
                put(make_frame(number, output))
    except Exception as error:
        words = {"message": f"{type(error).__name__}: {error}", "code": status_of(error)}
        if words["code"] >= 500:
            log.error("request %s: %s", request.request_id, words["message"])
        put(Frame(number, ending=json.dumps({"error": words}).encode()))


def read_parameters(request: SamplingRequest) -> SamplingParams:
    """vLLM's parameters of a request. Raises ValueError for those that vLLM does not have."""
    parameters = msgspec.convert(request.parameters, SamplingParams)
    scores = parameters.prompt_logprobs is not None
    parameters.output_kind = RequestOutputKind.FINAL_ONLY if scores else RequestOutputKind.DELTA
    parameters.flat_logprobs = True
    return parameters


def status_of(error: Exception) -> int:
    """The HTTP status that vLLM's own routes would give to an error."""
    if isinstance(error, GracefulHTTPError):
        return int(error.http_status)
    return 400 if isinstance(error, VLLMClientError | ValueError) else 500


def make_frame(number: int, output: RequestOutput) -> Frame:
    """What an engine hands out of one request."""
    (one,) = output.outputs
    if one.finish_reason == "error":
        raise RuntimeError("the engine ended the request with an error")
    ending = b""
    if one.finish_reason is not None:
        spans = [(span.version, span.start, span.end) for span in one.weight_versions or ()]
        ending = json.dumps({"finish_reason": one.finish_reason, "weight_versions": spans}).encode()
    logprobs = array("f") if one.logprobs is None else first_of_each(one.logprobs, 0)
    return Frame(number, array("i", one.token_ids), logprobs, take_rows(one), ending)


def first_of_each(found: Any, start: int) -> array[float]:
    """The log-prob of the token itself at each position from `start` on."""
    assert isinstance(found, FlatLogprobs)
    values = (found.logprobs[place] for place in found.start_indices[start:])
    return array("f", (value if value > LOWEST else LOWEST for value in values))


def take_rows(output: CompletionOutput) -> np.ndarray | None:
    """The routes that have come since the last message. Its list is the request's own: whoever reads it empties it."""
    rows: list[np.ndarray] = output.routed_experts  # type: ignore[assignment]
    if not rows:
        return None
    taken = np.concatenate(rows)
    rows.clear()
    return taken


def hand_over_rows() -> None:
    """Have vLLM give the rows of a request to its response whenever it makes a message of it.

    A message holds the request's own list of rows: messages that vLLM joins because their reader is slow lose none.
    """
    from vllm.v1.engine.output_processor import RequestState

    make_output = RequestState._new_completion_output

    def make_output_with_rows(self: RequestState, *args: Any, **kwargs: Any) -> CompletionOutput:
        output = make_output(self, *args, **kwargs)
        output.routed_experts = self.routed_experts_chunks or None  # type: ignore[assignment]
        return output

    RequestState._new_completion_output = make_output_with_rows
