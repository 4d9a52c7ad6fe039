"""A server that hands out tokens at a given pace in the form of our vLLM servers, and computes nothing.

    python tools/paced_server.py --key KEY --rate TOKENS_PER_SECOND --interval 64 --vocab 32000

Each running response gets a token an engine step; frames leave as vLLM's `stream_interval` has them: the first token at
once, then whenever so many have come. Responses run up to their `max_tokens`. Prints the port that it listens on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from array import array
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.controller.server_client import ABORT
from gspo_megatron.transport.auth import has_key
from gspo_megatron.transport.server_paths import GENERATE
from gspo_megatron.transport.token_frames import Frame, read_requests, write_frame


@dataclass(slots=True, eq=False)
class Running:
    """One response."""

    stream: web.StreamResponse
    number: int
    limit: int
    done: asyncio.Event
    """Of its stream: set when its last response is finished."""
    left: list[int]
    """Responses of its stream that run, in one number."""
    sampled: int = 0
    wait: int = 1
    """Tokens until its next frame."""


class PacedEngine:
    """Responses that all advance by one token a step."""

    def __init__(self, rate: float, answers: int, interval: int, vocab: int) -> None:
        self.steps_per_second = rate / answers
        self.interval = interval
        self.running: set[Running] = set()
        self.tokens = 0
        draw = random.Random(0)
        self._ids = array("i", [draw.randrange(3, vocab) for _ in range(4096)])
        self._logprobs = array("f", [-draw.random() for _ in range(4096)])
        self._due: deque[list[Running]] = deque([] for _ in range(interval + 1))

    def add(self, one: Running) -> None:
        """Let a response in; its first token comes with the next step."""
        self.running.add(one)
        self._due[0].append(one)

    async def run(self) -> None:
        """Step for ever, by the clock."""
        clock = asyncio.get_running_loop().time
        begin, steps = clock(), 0
        while True:
            steps += 1
            await self._step()
            await asyncio.sleep(max(0.0, begin + steps / self.steps_per_second - clock()))

    async def _step(self) -> None:
        due = self._due.popleft()
        self._due.append([])
        bodies: dict[web.StreamResponse, list[bytes]] = {}
        for one in due:
            one.sampled += one.wait
            self.tokens += one.wait
            ended = one.sampled >= one.limit
            bodies.setdefault(one.stream, []).append(self._frame(one, one.wait, ended))
            if ended:
                self.running.discard(one)
                one.left[0] -= 1
                continue
            # Responses that began together drift apart, as those of a real engine do: by their second frame.
            most = random.randint(1, self.interval) if one.sampled == 1 else self.interval
            one.wait = min(most, one.limit - one.sampled)
            self._due[one.wait - 1].append(one)
        for stream, frames in bodies.items():
            await stream.write(b"".join(frames))
        for one in due:
            if not one.left[0]:
                one.done.set()

    def _frame(self, one: Running, count: int, ended: bool) -> bytes:
        at = (one.number * 97 + one.sampled) % (4096 - count)
        spans = [["0", 0, one.sampled]]
        ending = json.dumps({"finish_reason": "length", "weight_versions": spans}).encode() if ended else b""
        ids, logprobs = self._ids[at : at + count], self._logprobs[at : at + count]
        return write_frame(Frame(one.number, ids, logprobs, ending=ending))


def application(engine: PacedEngine, key: str) -> web.Application:
    """The paths that a controller asks for between two weight updates."""

    async def generate(request: web.Request) -> web.StreamResponse:
        asked = read_requests(await request.read())
        stream = web.StreamResponse()
        await stream.prepare(request)
        done, left = asyncio.Event(), [len(asked)]
        for number, one in enumerate(asked):
            engine.add(Running(stream, number, one.parameters["max_tokens"], done, left))
        await done.wait()
        return stream

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/health" and not has_key(request.headers, key):
            return web.json_response({}, status=401)
        if request.path == "/metrics":
            return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {engine.tokens}.0\n')
        return web.json_response({"weight_version": "0", "is_paused": False})

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post(GENERATE, generate)
    app.router.add_post(ABORT, answer)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


async def main() -> None:
    """Serve until the parent ends."""
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", required=True)
    parser.add_argument("--rate", type=float, required=True, help="tokens a second of all responses")
    parser.add_argument("--answers", type=int, required=True, help="responses at a time")
    parser.add_argument("--interval", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    chosen = parser.parse_args()
    engine = PacedEngine(chosen.rate, chosen.answers, chosen.interval, chosen.vocab)
    runner = web.AppRunner(application(engine, chosen.key))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await engine.run()


if __name__ == "__main__":
    asyncio.run(main())
