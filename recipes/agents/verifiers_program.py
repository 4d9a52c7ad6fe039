"""Runs episodes of the library `verifiers` (0.4). It is started by `verifiers_client.py` with the library's own Python.

VERIFIERS_PYTHON verifiers_program.py TASKSET > problems.jsonl   # writes the problems of a taskset, for `data.path`

Otherwise: one JSON request a line on standard input, one JSON reply a line on standard output, in any order.
"""

import asyncio
import contextlib
import functools
import json
import os
import sys

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
from verifiers.v1.clients import EvalClientConfig  # pyright: ignore[reportMissingImports]
from verifiers.v1.utils.loaders import load_taskset, taskset_config_type  # pyright: ignore[reportMissingImports]


@functools.cache
def read_tasks(taskset):
    """All tasks of a taskset, by their place in it."""
    return list(load_taskset(taskset_config_type(taskset)(id=taskset)))


async def play(request):
    """One episode: the agent of the taskset's own harness, with this endpoint as its model."""
    task = read_tasks(request["taskset"])[request["task"]]
    # The library reads keys from the environment only.
    variable = f"EPISODE_KEY_{request['number']}"
    os.environ[variable] = request["api_key"]
    try:
        client = EvalClientConfig(base_url=request["base_url"], api_key_var=variable)
        harness, runtime = {"id": request.get("harness", "null")}, {"type": "subprocess"}
        config = vf.AgentConfig(harness=harness, runtime=runtime, model=request["model"], client=client)
        async with vf.Agent(config) as agent:
            trace = await agent.run(task)
    finally:
        del os.environ[variable]
    if not trace.ok:
        raise RuntimeError(trace.errors[-1].message if trace.errors else "the episode ended without a result")
    return {"reward": trace.reward if trace.rewards else None}


async def serve(output):
    """Play what is asked for, many episodes at a time, until standard input ends."""
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    episodes = {}

    async def answer(request):
        try:
            reply = await play(request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"number": request["number"], **reply}), file=output, flush=True)

    async for line in reader:
        request = json.loads(line)
        if "cancel" in request:
            with contextlib.suppress(KeyError):
                episodes.pop(request["cancel"]).cancel()
        else:
            episodes[request["number"]] = asyncio.create_task(answer(request))


def main():
    """Write the problems of a taskset, or serve."""
    if len(sys.argv) == 2:
        for place, task in enumerate(read_tasks(sys.argv[1])):
            print(json.dumps({"prompt": task.data.prompt_text, "taskset": sys.argv[1], "task": place}))
        return
    # What the library prints must not come between the replies.
    output, sys.stdout = sys.stdout, sys.stderr
    asyncio.run(serve(output))


if __name__ == "__main__":
    main()
