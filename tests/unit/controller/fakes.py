"""A fake of vLLM's HTTP interface, for the failures that a real server cannot be asked to have."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiohttp import web

from gspo_megatron.controller.server_client import ABORT, ServerClient
from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.transport.auth import has_key
from gspo_megatron.transport.messages import ServerIdentity, StreamState
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.token_frames import Frame, SamplingRequest, read_requests, write_frame
from gspo_megatron.transport.update_messages import WorkerLayout, WorkerReport
from gspo_megatron.types import Problem, Prompt

KEY = "unit-test-key"
VOCAB = 50
CONTEXT = 24


class BrokenOffError(Exception):
    """A stream that ends too early."""


class FakeServer:
    """Answers every request with the number of its token ids, three times by default."""

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
        self.tokens_a_look = 0
        """While true, generation waits."""
        self.tokens = 0
        """Sampled so far, by all requests."""
        self.length: Callable[[dict[str, Any]], int] = lambda body: 3
        """Tokens of an answer, by its request."""
        self.ids: Callable[[dict[str, Any]], Sequence[int]] | None = None
        """What it samples, by its request; the answer ends at a stop id, or when they are used up."""
        self.reason = "length"
        self.gate = 1 << 30
        """Answers wait before this token."""
        self.break_off_at = -1
        """Streams end without a reason before this token."""
        self.mark = 0
        """Expert of every token in the second of two layers; in the first it is the token's position."""
        self.delay = 0.0
        """Seconds a token takes."""
        self.device = "node 1 card 0"
        self.identity: ServerIdentity | None = None
        """What it says of itself."""
        self.aborts = 0
        self.refused = ""
        """Request that it will not answer."""
        self.forgotten: set[str] = set()
        """Requests that nobody waits for."""
        self.missed_aborts = 0
        """Aborts that come before the requests they are meant for."""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path != "/health" and not has_key(request.headers, KEY):
            return web.json_response({}, status=401)
        self.calls.append(path + (f" {request.query['tags']}" if path == "/wake_up" else ""))
        if path in self.fail:
            return web.json_response({"error": f"{path} was made to fail"}, status=self.fail[path])
        if path == GENERATE:
            return await self._generate(request, read_requests(await request.read()))
        if path == ABORT:
            self.forgotten |= set((await request.json())["request_ids"])
        if path == "/metrics":
            self.tokens += self.tokens_a_look
            return web.Response(
                text=f'vllm:generation_tokens_total{{engine="0",model_name="policy"}} {self.tokens}.0\n'
            )
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause" and request.query["mode"] == "keep"
            if path == "/pause" and request.query["mode"] == "abort":
                self.aborts += self.missed_aborts == 0
                self.missed_aborts = max(0, self.missed_aborts - 1)
        if path == "/finish_weight_update":
            self.version = (await request.json())["weight_version"]
        if path == "/update_weight_version":
            self.version = (await request.json())["new_version"]
        if path == "/weight_info":
            return web.json_response({"weight_version": self.version})
        if path == "/collective_rpc":
            return web.json_response({"results": [self._worker((await request.json())["method"])]})
        return web.json_response({"is_paused": self.paused} if path == "/is_paused" else {})

    def _worker(self, method: str) -> str | None:
        if method == "device_name":
            return self.device
        if method == "identity":
            return self.identity.to_json() if self.identity is not None else "{}"
        if method == "weight_layout":
            return WorkerLayout(layout=ServerLayout()).to_json()
        report = WorkerReport(checksum=self.checksum, tensors=1, seconds=0.1, received_bytes=8, needed_bytes=8)
        return report.to_json() if method == "weight_report" else None

    async def _generate(self, request: web.Request, asked: list[SamplingRequest]) -> web.StreamResponse:
        bodies = [
            {"request_id": one.request_id, "token_ids": one.token_ids.tolist(), "sampling_params": one.parameters}
            for one in asked
        ]
        self.bodies += bodies
        while self.hang:
            await asyncio.sleep(0.01)
        response = web.StreamResponse()
        await response.prepare(request)
        samples = [asyncio.create_task(self._sample(response, number, body)) for number, body in enumerate(bodies)]
        try:
            await asyncio.gather(*samples)
        except BrokenOffError:
            for sample in samples:
                sample.cancel()
        return response

    async def _sample(self, response: web.StreamResponse, number: int, body: dict[str, Any]) -> None:
        parameters = body["sampling_params"]
        if body["request_id"] == self.refused:
            words = {"error": {"message": "made to be refused", "code": 400}}
            await response.write(write_frame(Frame(number, ending=json.dumps(words).encode())))
            return
        if "prompt_logprobs" in parameters:
            scores = array("f", [self.score] * (len(body["token_ids"]) - 1))
            await response.write(write_frame(Frame(number, logprobs=scores, ending=write_ending("length", ()))))
            return
        token, spans, reason, aborts = len(body["token_ids"]), [], None, self.aborts
        planned = [token] * self.length(body) if self.ids is None else list(self.ids(body))
        routed = parameters.get("routed_experts_prompt_start")
        stops = [place for place, one in enumerate(planned, 1) if one in parameters["stop_token_ids"]]
        wanted = min(len(planned), parameters["max_tokens"], *stops[:1])
        for place, token in enumerate(planned[:wanted]):
            is_left = False
            while (self.paused or place >= self.gate) and self.aborts == aborts and not is_left:
                is_left = body["request_id"] in self.forgotten
                await asyncio.sleep(0.005)
            if self.aborts != aborts or is_left:
                reason = "abort"
                break
            if place == self.break_off_at:
                raise BrokenOffError
            await asyncio.sleep(self.delay)
            if not spans or spans[-1][0] != self.version:
                spans.append([self.version, place, place])
            spans[-1][2] = place + 1
            self.tokens += 1
            rows = None
            if routed is not None:
                now = len(body["token_ids"]) + place
                rows = np.array([[[position], [self.mark]] for position in range(routed, now)], np.uint8)
                routed = now
            logprobs = array("f", [-0.5] if "logprobs" in parameters else [])
            await response.write(write_frame(Frame(number, array("i", [token]), logprobs, rows)))
        ended = "stop" if self.ids is not None and wanted in stops else self.reason
        await response.write(write_frame(Frame(number, ending=write_ending(reason or ended, spans))))


def write_ending(reason: str, spans: Sequence[Sequence[Any]]) -> bytes:
    """The last words of our servers on a request."""
    return json.dumps({"finish_reason": reason, "weight_versions": spans}).encode()


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

    def held_out(self, count: int | None) -> list[Prompt]:
        return [make_prompt(-1 - index) for index in range(5 if count is None else count)]

    def state(self) -> dict[str, Any]:
        return StreamState(index=self.index, position=0, skipped={}, fingerprint="").model_dump()

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


class Tokenizer:
    """Ids as decimal text; 0 stops."""

    stop_ids = (0,)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
