"""The controller's HTTP face. JSON in and out; every path but `/health` asks for the job key."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from gspo_megatron.config.loading import RecipeError, load_resolved
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.store import SampleStore
from gspo_megatron.plan.machine import alternates, machine_of
from gspo_megatron.rollout.asking import make_calls
from gspo_megatron.rollout.auth import OPEN_PATH, REFUSAL, has_key, is_of_job, read_key
from gspo_megatron.rollout.client import ServerClient
from gspo_megatron.rollout.controller import Controller
from gspo_megatron.rollout.dispatch import with_reserve
from gspo_megatron.rollout.fleet import Fleet, Refused
from gspo_megatron.rollout.identity import identity_of
from gspo_megatron.rollout.processes import die_with_parent
from gspo_megatron.rollout.scoring import Scorer, ScoringPool
from gspo_megatron.rollout.turns import make_thinking
from gspo_megatron.watchdog import follow

SCORING_SECONDS = 10.0
"""Time limit of one answer's scorer."""
MAX_SCORING_PROCESSES = 8
SAMPLES = "samples"
"""Directory of the sample store within the run directory."""
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


def build(recipe: Recipe, run_dir: Path, host: str, urls: list[str], key: str) -> Controller:
    """A controller of real parts. Needs a running event loop."""
    from gspo_megatron.data.stream import PromptStream
    from gspo_megatron.data.tokenizers import load_tokenizer
    from gspo_megatron.rewards import make_scorer

    assert recipe.model.architecture is not None
    rollout = recipe.rollout
    context = rollout.max_prompt_tokens + rollout.max_answer_tokens
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)
    make: Callable[[], Scorer] = functools.partial(make_scorer, recipe)
    vocab = recipe.model.architecture.vocab_size
    # Before the connections: a broken prompt file ends the controller with its sentence as the last line.
    stream = PromptStream(recipe, tokenizer)
    servers = [ServerClient(url, key, vocab, context, with_reserve(rollout.max_concurrency)) for url in urls]
    processes = min(MAX_SCORING_PROCESSES, os.cpu_count() or 1)
    return Controller(
        recipe,
        Fleet(servers, identity_of(recipe, run_dir)),
        stream,
        tokenizer,
        ScoringPool(make, processes, SCORING_SECONDS),
        SampleStore(run_dir / SAMPLES),
        host,
        overlaps=not machine_of(recipe).colocated,
        sleeps=alternates(recipe),
        thinking=make_thinking(rollout.thinking, tokenizer),
        calls=make_calls(recipe, tokenizer, processes),
    )


def main() -> None:
    """Serve until the parent ends or SIGTERM comes."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gspo_megatron.rollout.controller", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="holds recipe.resolved.yaml; samples go there")
    parser.add_argument("--host", required=True, help="this controller's address as trainer and servers reach it")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--servers", required=True, help="addresses of the vLLM servers, comma-separated")
    arguments = parser.parse_args()
    # Every answer in flight holds a connection; the usual soft limit is 1024.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    key = read_key()
    follow(arguments.run_dir, "controller")

    async def application() -> web.Application:
        recipe = load_resolved(arguments.run_dir / "recipe.resolved.yaml")
        controller = build(recipe, arguments.run_dir, arguments.host, arguments.servers.split(","), key)
        return Service(controller, key).application()

    try:
        web.run_app(
            application(), host=arguments.host, port=arguments.port, access_log=None, print=None, shutdown_timeout=1.0
        )
    except RecipeError as error:
        raise SystemExit(f"controller: {error}") from None
    except OSError as error:
        raise SystemExit(f"controller: cannot listen on {arguments.host}:{arguments.port}: {error.strerror}") from None
