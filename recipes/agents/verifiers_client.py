"""Episodes of the library `verifiers` as an agent.

`verifiers` 0.4 requires openai below 3, so it cannot be installed beside the pins. It runs in its own environment, as a
client of the endpoint; VERIFIERS_PYTHON names that environment's Python (`uv venv`, `uv pip install verifiers`).
A line of data names `taskset` and `task`; `verifiers_program.py TASKSET` writes such lines.
"""

import asyncio
import contextlib
import json
import os
from pathlib import Path

PROGRAM = Path(__file__).with_name("verifiers_program.py")


class Program:
    """The process that runs the library, and the episodes that wait for it."""

    def __init__(self):
        self.waiting, self.number = {}, 0
        self.started = asyncio.ensure_future(self.start())

    async def start(self):
        """Start the process, and read its replies from now on."""
        python = os.environ.get("VERIFIERS_PYTHON")
        if not python:
            raise RuntimeError("VERIFIERS_PYTHON is not set; name the Python of an environment that has verifiers")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(python, str(PROGRAM), stdin=pipe, stdout=pipe, limit=1 << 26)
        self.reading = asyncio.create_task(self.read(process.stdout))
        return process.stdin

    async def read(self, output):
        """Hand every reply to its episode; when the process ends, all of them fail."""
        async for line in output:
            reply = json.loads(line)
            if (episode := self.waiting.get(reply["number"])) and not episode.done():
                episode.set_result(reply)
        for episode in self.waiting.values():
            episode.set_exception(RuntimeError("the process of verifiers ended"))

    async def ask(self, request):
        """Play one episode; one that is cancelled here is cancelled there."""
        stdin = await self.started
        self.number += 1
        number = self.number
        self.waiting[number] = asyncio.get_running_loop().create_future()
        stdin.write(json.dumps({"number": number, **request}).encode() + b"\n")
        try:
            return await self.waiting[number]
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                stdin.write(json.dumps({"cancel": number}).encode() + b"\n")
            raise
        finally:
            del self.waiting[number]


programs = {}


async def run(problem, client):
    """Play the task of a line of data; its rewards are the score, or without one the recipe's reward scores."""
    loop = asyncio.get_running_loop()
    program = programs.get(loop) or programs.setdefault(loop, Program())
    request = {"base_url": client.base_url, "api_key": client.api_key, "model": client.model}
    reply = await program.ask({"taskset": problem["taskset"], "task": problem["task"], **request})
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply["reward"]
