"""The OpenAI-compatible endpoint: what an unmodified client of an agent talks to. It listens on the loopback only."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from contextlib import AbstractContextManager
from typing import Any, Protocol

from aiohttp import web

from gspo_megatron.controller import chat_format
from gspo_megatron.controller.agent_pool import LOOPBACK
from gspo_megatron.controller.chat_format import ChatRequest, ChatTurn, RequestError
from gspo_megatron.controller.servers import Refused

log = logging.getLogger(__name__)
MAX_BODY = 64 << 20
"""Bytes of a request."""
ALIVE_SECONDS = 15.0
"""A client that waits gets a blank so often: its own limit counts from the last byte."""


class Episode(Protocol):
    """One conversation: a `Session`."""

    def waiting(self) -> AbstractContextManager[None]: ...
    async def answer(self, request: ChatRequest) -> ChatTurn: ...


class Episodes(Protocol):
    """What finds the episode of a key: an `AgentScheduler`."""

    base_url: str

    def session(self, key: str) -> Episode | None: ...


class AgentEndpoint:
    """`/v1/models` and `/v1/chat/completions`. The API key names the episode."""

    def __init__(self, scheduler: Episodes) -> None:
        self._scheduler = scheduler
        self._warned: set[str] = set()
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/chat/completions", self._complete_chat)
        # A client that goes away must not keep a server busy.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)

    async def start(self) -> None:
        """Listen on a free port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        self._scheduler.base_url = f"http://{LOOPBACK}:{self._runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        if self._session(request) is None:
            return _refuse_key()
        return web.json_response(chat_format.write_models())

    async def _complete_chat(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        if session is None:
            return _refuse_key()
        with session.waiting():
            try:
                asked = chat_format.read_request(await request.read())
                self._warn(asked)
                turn = asyncio.ensure_future(session.answer(asked))
                return await self._respond(request, asked, turn)
            except RequestError as error:
                return web.json_response(chat_format.write_error(str(error), error.code), status=400)
            except Refused as error:
                return web.json_response(chat_format.write_error(str(error), "run_failed"), status=500)

    async def _respond(
        self, request: web.Request, asked: ChatRequest, turn: asyncio.Future[ChatTurn]
    ) -> web.StreamResponse:
        """Send a turn when it is there; blanks until then, which neither JSON nor a stream of events counts."""
        kind = "text/event-stream" if asked.stream else "application/json"
        response = web.StreamResponse(headers={"Content-Type": kind})
        try:
            while not (await asyncio.wait({turn}, timeout=ALIVE_SECONDS))[0]:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(b":\n\n" if asked.stream else b" ")
            # Once a byte is out, a refusal cannot have a status of its own any more.
            refused = turn.exception() if response.prepared else None
            body = _write(turn.result(), asked) if refused is None else _write_late(refused)
            if not response.prepared:
                await response.prepare(request)
            await response.write(body)
            await response.write_eof()
            return response
        finally:
            await _end(turn)

    def _session(self, request: web.Request) -> Episode | None:
        return self._scheduler.session(request.headers.get("Authorization", "").removeprefix("Bearer "))

    def _warn(self, asked: ChatRequest) -> None:
        for name in asked.overruled:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("the agent sets %s, which is left aside: the recipe decides how responses are drawn", name)


def _write(turn: ChatTurn, asked: ChatRequest) -> bytes:
    episode = secrets.token_hex(8)
    if not asked.stream:
        return json.dumps(chat_format.write_completion(turn, asked, episode)).encode()
    chunks: list[Any] = chat_format.write_chunks(turn, asked, episode)
    return b"".join(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks) + b"data: [DONE]\n\n"


def _write_late(error: BaseException) -> bytes:
    return json.dumps(chat_format.write_error(str(error), getattr(error, "code", "run_failed"))).encode()


async def _end(turn: asyncio.Future[ChatTurn]) -> None:
    """Cancel a turn that nobody waits for any more, and let it put its response in order."""
    if not turn.done():
        turn.cancel()
        await asyncio.wait({turn})


def _refuse_key() -> web.Response:
    sentence = "this API key belongs to no episode that runs; use the one of ClientSettings, until the agent returns"
    return web.json_response(chat_format.write_error(sentence, "invalid_api_key"), status=401)
