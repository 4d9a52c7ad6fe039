"""A stand-in for vLLM's HTTP face, for the failures that a real server cannot be asked to have."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from aiohttp import web

from gspo_megatron.rollout.auth import has_key
from gspo_megatron.rollout.client import ServerClient
from gspo_megatron.types import Problem, Prompt
from gspo_megatron.weights.server_layout import ServerLayout

KEY = "unit-test-key"
VOCAB = 50
CONTEXT = 24


class FakeServer:
    """Answers every prompt with its own length in tokens, three of them."""

    def __init__(self) -> None:
        self.url = ""
        self.version = "0"
        self.paused = False
        self.checksum = "0"
        self.score = -1.0
        self.fail: dict[str, int] = {}
        """Path -> status that it is answered with."""
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.hang = False
        """While true, generation waits."""
        self.tokens = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path != "/health" and not has_key(request.headers, KEY):
            return web.json_response({}, status=401)
        self.calls.append(path)
        if path in self.fail:
            return web.json_response({"error": f"{path} was told to fail"}, status=self.fail[path])
        if path == "/inference/v1/generate":
            return web.json_response(await self._generate(await request.json()))
        if path == "/metrics":
            return web.Response(
                text=f'vllm:generation_tokens_total{{engine="0",model_name="policy"}} {self.tokens}.0\n'
            )
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        if path == "/finish_weight_update":
            self.version = (await request.json())["weight_version"]
        if path == "/collective_rpc":
            return web.json_response({"results": [self._worker((await request.json())["method"])]})
        return web.json_response({"is_paused": self.paused} if path == "/is_paused" else {})

    def _worker(self, method: str) -> dict[str, Any] | None:
        if method == "weight_layout":
            return asdict(ServerLayout())
        report = {"checksum": self.checksum, "tensors": 1, "seconds": 0.1, "received_bytes": 8, "needed_bytes": 8}
        return report if method == "weight_report" else None

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        while self.hang:
            await asyncio.sleep(0.01)
        ids = [len(body["token_ids"])] * 3
        self.tokens += 3
        content = [{"token_id": token, "logprob": -0.5} for token in ids]
        choice = {
            "token_ids": ids,
            "finish_reason": "length",
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
        }
        scored = [None, *({str(token): {"logprob": self.score}} for token in body["token_ids"][1:])]
        return {"choices": [choice], "prompt_logprobs": scored}


@asynccontextmanager
async def serving(*servers: FakeServer) -> AsyncIterator[list[ServerClient]]:
    """Clients of fake servers that listen."""
    runners, clients = [], []
    try:
        for server in servers:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", server._handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server.url = "http://{}:{}".format(*runner.addresses[0][:2])
            clients.append(ServerClient(server.url, KEY, VOCAB, CONTEXT, 8))
        yield clients
    finally:
        for server in servers:
            server.hang = False
        for client in clients:
            await client.close()
        for runner in runners:
            await runner.cleanup()


def make_prompt(index: int, token_ids: Sequence[int] = (1, 2, 3)) -> Prompt:
    return Prompt(index, Problem(str(index), f"question {index}", {}), tuple(token_ids))


class Prompts:
    """A prompt stream in memory."""

    def __init__(self) -> None:
        self.index = 0
        self.skipped: Counter[str] = Counter()

    def next(self, count: int) -> list[Prompt]:
        self.index += count
        return [make_prompt(index, (1,) * (1 + index % 5)) for index in range(self.index - count, self.index)]

    def held_out(self, count: int) -> list[Prompt]:
        return [make_prompt(-1 - index) for index in range(count)]

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


class Tokenizer:
    """Ids as decimal text; 0 stops."""

    stop_ids = (0,)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
