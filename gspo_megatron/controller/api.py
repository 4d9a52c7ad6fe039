"""The controller's HTTP face. JSON in and out; every path but `/health` asks for the job key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from gspo_megatron.config.loading import RecipeError
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.servers import Refused
from gspo_megatron.transport.auth import OPEN_PATH, REFUSAL, has_key, is_of_job

MAX_BODY = 1 << 30
"""The state of a checkpoint names every group under way with its prompt: some MB, beyond aiohttp's default of 1."""


class Service:
    """Routes, one operation at a time."""

    def __init__(self, controller: Controller, key: str) -> None:
        self.controller = controller
        self._key = key
        self._operation: str | None = None

    def application(self) -> web.Application:
        """The aiohttp application; the controller starts with it."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.get(OPEN_PATH, self._health),
                web.get("/status", self._status),
                web.get("/state", self._state),
                web.post("/state", self._operate(self._restore)),
                web.post("/rollout", self._operate(lambda body: self.controller.rollout(int(body["step"])))),
                web.post("/evaluate", self._operate(self._evaluate)),
                web.post("/sleep", self._operate(self._sleep)),
                web.post("/weights/begin", self._operate(self._begin)),
                web.post("/weights/finish", self._operate(self._finish)),
            ]
        )
        app.cleanup_ctx.append(self._lifetime)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path != OPEN_PATH and not (is_of_job(request.remote) and has_key(request.headers, self._key)):
            return web.json_response({"error": REFUSAL}, status=401)
        return await handler(request)

    def _operate(
        self, operation: Callable[[dict[str, Any]], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """A handler that runs one operation alone and turns its refusal into a 409 with the sentence."""

        async def handle(request: web.Request) -> web.Response:
            if self._operation is not None:
                return web.json_response({"error": f"the controller is busy with {self._operation}"}, status=409)
            self._operation = request.path
            try:
                return web.json_response(await operation(await request.json()))
            except (Refused, RecipeError) as error:
                sentence = " ".join(str(error).split())
                logging.error("%s: %s", request.path, sentence)
                return web.json_response({"error": sentence}, status=409)
            finally:
                self._operation = None

        return handle

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self.controller.status())

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(await self.controller.state())

    async def _restore(self, body: dict[str, Any]) -> dict[str, Any]:
        await self.controller.restore(body)
        return {}

    async def _evaluate(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self.controller.evaluate(int(body["problems"]), int(body["answers"]), float(body["temperature"]))

    async def _sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        await self.controller.sleep()
        return {}

    async def _begin(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self.controller.begin_update(int(body["version"]), body["terms"], body["devices"])

    async def _finish(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self.controller.finish_update(int(body["version"]), body["checksums"], body["probes"])

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
