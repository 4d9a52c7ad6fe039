"""The servers of a run: which of them serve, and why the others do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.transport.identity import Identity

log = logging.getLogger(__name__)
RETURN_SECONDS = 2.0
"""How often lost servers are looked for."""


class Refused(RuntimeError):
    """What the controller cannot or will not do; one sentence, sent to the caller as it is."""


class ServerSet:
    """All servers of a run. One that is dropped serves again only as a new process, from the next weights on."""

    def __init__(self, servers: Sequence[ServerClient], identity: Identity | None = None) -> None:
        """
        Args:
            servers: by address.
            identity: what each of them must be; None = they are not asked (engines that are simulated).
        """
        self.all = tuple(servers)
        """Live or not, in the order of the command line."""
        self._identity = identity
        self._watchers: list[asyncio.Task[None]] = []
        self._returning: set[ServerClient] = set()

    @property
    def live(self) -> list[ServerClient]:
        """The servers in use, in the order of the command line."""
        return [server for server in self.all if not server.fault]

    def drop(self, server: ServerClient, reason: str) -> None:
        """Take a server out for good. Raises Refused with the reason if it was the last one."""
        if not server.fault:
            server.fault = reason
            log.error("server %s is taken out: %s", server.url, reason)
        if not self.live:
            raise Refused(f"no server is left: {reason}")

    def faults(self) -> dict[str, str]:
        """By address: why a server is out, or an empty text."""
        return {server.url: server.fault for server in self.all}

    async def wait_healthy(self, timeout: float) -> None:
        """Wait until every server answers its health check and is what this run needs.

        Raises:
            Refused: naming the first that does not, or is not.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        for server in self.all:
            while not await server.is_healthy():
                if asyncio.get_running_loop().time() > deadline:
                    raise Refused(
                        f"server {server.url} did not answer its health check within "
                        f"rollout.start_timeout={timeout:g} s; its log says why"
                    )
                await asyncio.sleep(0.25)

        for server in self.all:
            try:
                await self.check(server)
            except ServerError as error:
                raise Refused(str(error)) from None

    async def check(self, server: ServerClient) -> None:
        """Raise ServerError if a server is of another run, or serves another model than the recipe's."""
        if self._identity is not None and (fault := self._identity.fault_of(await server.identity())):
            raise ServerError(f"server {server.url} {fault}")

    def watch(self) -> None:
        """From now on, give up servers that hold answers and make no progress."""
        self._watchers = [asyncio.create_task(server.watch()) for server in self.all]
        self._watchers.append(asyncio.create_task(self._look_for_returning()))

    def take_back(self) -> None:
        """Count servers that were started again among the live ones; to be called when all are given weights."""
        for server in self._returning:
            log.info("server %s is back", server.url)
            server.fault = ""
            self._watchers.append(asyncio.create_task(server.watch()))
        self._returning.clear()

    async def _look_for_returning(self) -> None:
        while True:
            for server in self.all:
                if server.fault and await server.is_fresh():
                    self._returning.add(server)
            await asyncio.sleep(RETURN_SECONDS)

    async def close(self) -> None:
        """Close all connections."""
        for watcher in self._watchers:
            watcher.cancel()
        for server in self.all:
            await server.close()
