"""A server whose engine has died ends, also while a request waits for that engine's answer."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import httpx
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import serve_http

from gspo_megatron.inference.server import end_in_time


def test_a_request_that_gets_no_answer_does_not_keep_the_server_of_a_dead_engine() -> None:
    # Seen: /sleep was asked in the moment in which the engine was killed; the run waited for 120 s.
    app, engine = FastAPI(), SimpleNamespace(errored=False, is_running=True)
    app.state.engine_client = engine

    @app.post("/sleep")
    async def sleep() -> None:
        engine.errored, engine.is_running = True, False
        await asyncio.Event().wait()

    async def ask(port: int) -> int:
        async with httpx.AsyncClient(timeout=None, transport=httpx.AsyncHTTPTransport(retries=100)) as client:
            return (await client.post(f"http://127.0.0.1:{port}/sleep")).status_code

    async def run() -> int:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            answer = asyncio.create_task(ask(listening.getsockname()[1]))
            await (await serve_http(app, listening, log_level="warning"))
            return await answer

    end_in_time()
    assert asyncio.run(run()) == 500
