"""A user's agent in processes of its own, many episodes at a time."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from gspo_megatron.cluster.free_ports import LOOPBACK
from gspo_megatron.config.agent_section import AgentSection
from gspo_megatron.config.hooks import load_hook
from gspo_megatron.controller.loop_pool import LoopPool
from gspo_megatron.environments.agent_contract import ClientSettings
from gspo_megatron.rewards.reward_input import read_parts
from gspo_megatron.transport.auth import KEY_VARIABLE

STRETCH_SECONDS = 10.0
"""Processor time that an agent may take between two awaits."""

Program = Callable[[dict[str, Any], ClientSettings], Awaitable[Any]]


class AgentPool:
    """Processes that run episodes; each goes to the next process."""

    def __init__(self, section: AgentSection, workers: int) -> None:
        """
        Args:
            section: `agent` of the recipe.
            workers: processes.
        """
        make = functools.partial(load_program, section.program)
        share = -(-section.concurrency // workers)
        self._pools = [LoopPool(make, STRETCH_SECONDS, "agent", share, math.inf) for _ in range(workers)]
        self._next = itertools.cycle(self._pools)
        self._of: dict[Future[Any], LoopPool] = {}

    def start(self) -> None:
        """Start all processes now, in the background."""
        for pool in self._pools:
            pool.start()

    def run(self, problem: dict[str, Any], client: ClientSettings) -> Future[Any]:
        """Run one episode; what the agent returned, or a `Lost`."""
        pool = next(self._next)
        future = pool.ask(problem, client)
        self._of[future] = pool
        future.add_done_callback(lambda done: self._of.pop(done, None))
        return future

    def cancel(self, future: Future[Any]) -> None:
        """End an episode."""
        if (pool := self._of.get(future)) is not None:
            pool.cancel(future)

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools:
            pool.close()


def load_program(reference: str) -> Program:
    """Load the agent within its process, which reads what it returns: a score, or what the user calls one."""
    prepare_process()
    program: Program = load_hook("agent", reference)

    async def run(problem: dict[str, Any], client: ClientSettings) -> float | dict[str, float] | None:
        returned = await program(problem, client)
        if returned is None:
            return None
        parts = read_parts(returned)
        return parts.get("", parts)

    return run


def prepare_process() -> None:
    """Leave an agent no key of the job, and this machine to be reached without a proxy."""
    os.environ.pop(KEY_VARIABLE, None)
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))
