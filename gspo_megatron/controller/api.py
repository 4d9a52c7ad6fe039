"""The controller's HTTP service: a table of routes and handlers. Every path but `/health` needs the job key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.servers import Refused
from gspo_megatron.data.store import DamagedSample
from gspo_megatron.transport import routes
from gspo_megatron.transport.auth import OPEN_PATH, REFUSAL, has_key, is_of_job
from gspo_megatron.transport.messages import Empty, ErrorReply
from gspo_megatron.transport.routes import Route
from gspo_megatron.transport.wire_message import SAME_VERSION, MessageError, WireMessage

MAX_BODY = 1 << 30
"""Bytes. The state of a checkpoint names every group in flight with its prompt: some MB; aiohttp's default is 1 MB."""


@dataclass(frozen=True, slots=True)
class Endpoint[Request: WireMessage, Response: WireMessage]:
    """A route with what answers it."""

    route: Route[Request, Response]
    handler: Callable[[Request], Awaitable[Response]]
    alone: bool = True
    """Whether it is refused while another such operation runs."""


def endpoints(controller: Controller) -> tuple[Endpoint[Any, Any], ...]:
    """Every route of the service with its handler."""
    updater = controller.updater
    return (
        Endpoint(routes.HEALTH, answer_health, alone=False),
        Endpoint(routes.STATUS, controller.status, alone=False),
        Endpoint(routes.READ_STATE, controller.state, alone=False),
        Endpoint(routes.RESTORE_STATE, controller.restore),
        Endpoint(routes.ROLLOUT, controller.rollout),
        Endpoint(routes.EVALUATE, controller.evaluate),
        Endpoint(routes.SLEEP, updater.sleep),
        Endpoint(routes.BEGIN_UPDATE, updater.begin),
        Endpoint(routes.FINISH_UPDATE, updater.finish),
    )


async def answer_health(request: Empty) -> Empty:
    """Say that the controller's process listens."""
    return request


class Service:
    """The endpoints of one controller as an aiohttp application."""

    def __init__(self, controller: Controller, key: str) -> None:
        self.controller = controller
        self._key = key
        self._operation: str | None = None

    def application(self) -> web.Application:
        """The aiohttp application; the controller starts with it."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        for endpoint in endpoints(self.controller):
            app.router.add_route(endpoint.route.method, endpoint.route.path, self._bind(endpoint))
        app.cleanup_ctx.append(self._lifetime)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path != OPEN_PATH and not (is_of_job(request.remote) and has_key(request.headers, self._key)):
            return refuse(401, REFUSAL)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return refuse(error.status, f"{request.method} {request.path}: {error.reason}; {SAME_VERSION}")

    def _bind(self, endpoint: Endpoint[Any, Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        """An aiohttp handler that parses the request, runs one operation alone and sends its response."""

        async def handle(request: web.Request) -> web.Response:
            if endpoint.alone and self._operation is not None:
                return refuse(409, f"the controller is busy with {self._operation}")
            if endpoint.alone:
                self._operation = request.path
            try:
                body = await request.read() if endpoint.route.method == "POST" else Empty().to_json()
                response = await endpoint.handler(endpoint.route.request.from_json(body))
                return web.json_response(text=response.to_json())
            except (MessageError, web.RequestPayloadError) as error:
                return refuse_logged(request, 400, str(error))
            except (Refused, RecipeError, DamagedSample) as error:
                return refuse_logged(request, 409, str(error))
            except web.HTTPException:
                raise
            except Exception as error:
                logging.exception("%s failed", request.path)
                fault = " ".join(f"{type(error).__name__}: {error}".split())
                return refuse(500, f"{request.path} failed in the controller: {fault}; its log has the stack")
            finally:
                if endpoint.alone:
                    self._operation = None

        return handle

    async def _lifetime(self, app: web.Application) -> AsyncIterator[None]:
        starting = asyncio.create_task(self._start())
        yield
        starting.cancel()
        await self.controller.close()

    async def _start(self) -> None:
        try:
            await self.controller.start()
        except Refused as error:
            logging.error("%s", error)


def refuse_logged(request: web.Request, status: int, sentence: str) -> web.Response:
    """A response with one sentence, which the log gets too."""
    sentence = " ".join(sentence.split())
    logging.error("%s: %s", request.path, sentence)
    return refuse(status, sentence)


def refuse(status: int, sentence: str) -> web.Response:
    """A response with one sentence."""
    return web.json_response(text=ErrorReply(error=sentence).to_json(), status=status)
