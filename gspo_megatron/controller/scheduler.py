"""Which generation goes to which server, and when: none waits while a server has room, no server holds too many."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gspo_megatron.controller.generation import Generation, Sampling
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.types import StopReason

URGENT, TRAINING = 0, 1
"""Evaluations go before training samples, which wait meanwhile."""
REFRESH_SECONDS = 5.0
"""Age at which a server's count of KV tokens is computed again; in between, only what is sent there is added."""
SPREAD = 8
"""Answers that a server may hold beyond the emptiest one before a prompt's further answers leave its prefix cache."""


def with_reserve(concurrency: int) -> int:
    """Answers to send to a server that decodes so many at a time: the next is there when one ends.

    Few, because what waits there waits in the order of its arrival, and here the oldest goes first.
    """
    return concurrency + max(2, concurrency // 16)


@dataclass(order=True, slots=True)
class QueuedGeneration:
    """A generation that waits for a server."""

    urgency: tuple[int, int, int]
    """Kind, first version, order of arrival."""
    generation: Generation = field(compare=False)
    server: asyncio.Future[ServerClient | None] = field(compare=False)
    """None: the generation was interrupted before a server had room."""


class Scheduler:
    """Brings generations to their end on the servers of a run."""

    def __init__(self, servers: ServerSet, version: Callable[[], int | None]) -> None:
        """
        Args:
            servers: all servers of the run.
            version: weights that all of them hold; None while those change, and then nothing is sent.
        """
        self._servers, self._version = servers, version
        self._queued: list[QueuedGeneration] = []
        self._arrivals = itertools.count()
        self._held: dict[ServerClient, set[Generation]] = {server: set() for server in servers.all}
        self._homes: dict[int, ServerClient] = {}
        self._of_prompt: Counter[int] = Counter()
        self._loads: dict[ServerClient, tuple[float, int]] = {}
        self._training_waits = False
        self._interrupted = False

    async def complete(self, generation: Generation, sampling: Sampling, kind: int = TRAINING) -> StopReason:
        """Sample a response to its end, on as many servers as it takes.

        Returns:
            Why it ended; `abort` when it was interrupted: the generation keeps what it has.

        Raises:
            Refused: no server is left, or none may see this prompt.
        """
        index = generation.prompt.index
        with self.staying(index):
            while (server := await self._queue(generation, kind)) is not None:
                try:
                    if self._version() is not None:
                        generation.first_version = (
                            self._version() if generation.first_version is None else generation.first_version
                        )
                        return await server.generate(generation, sampling, self._version)
                except ServerError as error:
                    self._servers.drop(server, str(error))
                except ValueError as error:
                    raise Refused(f"prompt {index}: {error}") from None
                finally:
                    self._held[server].discard(generation)
                    self.proceed()
        return "abort"

    @contextmanager
    def staying(self, index: int) -> Iterator[None]:
        """Keep the server that holds a prompt's KV the first choice for it."""
        self._of_prompt[index] += 1
        try:
            yield
        finally:
            self._of_prompt[index] -= 1
            if not self._of_prompt[index]:
                del self._of_prompt[index]
                self._homes.pop(index, None)

    def proceed(self) -> None:
        """Send what can be sent; to be called when servers, versions or `hold` have changed."""
        if not self._servers.live:
            for turn in self._queued:
                if not turn.server.done():
                    turn.server.set_exception(
                        Refused(f"no server is left: {'; '.join(self._servers.faults().values())}")
                    )
            self._queued.clear()
        while self._queued and self._version() is not None:
            turn = self._queued[0]
            if turn.server.done():  # its task was cancelled
                heapq.heappop(self._queued)
                continue
            if self._training_waits and turn.urgency[0] == TRAINING:
                return
            server = self._choose(turn.generation)
            if server is None:
                return
            heapq.heappop(self._queued)
            self._held[server].add(turn.generation)
            counted, load = self._loads.get(server, (-math.inf, 0))
            self._loads[server] = (counted, load + _tokens(turn.generation))
            turn.server.set_result(server)

    def hold(self, training_waits: bool) -> None:
        """Keep training samples waiting, or let them continue."""
        self._training_waits = training_waits
        self.proceed()

    def resume(self) -> None:
        """Let training samples begin again after `interrupt`."""
        self._interrupted = False

    async def interrupt(self) -> None:
        """End every training sample where it is, and every one to come: `complete` returns `abort` until `resume`."""
        self._interrupted = True
        for turn in self._queued:
            if not turn.server.done():
                turn.server.set_result(None)
        self._queued.clear()
        await asyncio.gather(*(self._interrupt(server) for server in self._servers.live))

    def forget(self, generation: Generation) -> None:
        """Give up a response that is not sampled at the moment."""

    def measure(self) -> dict[str, float]:
        """Metrics since the last call."""
        return {}

    async def close(self) -> None:
        """End what runs beside the servers."""

    async def _interrupt(self, server: ServerClient) -> None:
        if not self._held[server]:
            return
        try:
            await server.interrupt()
        except ServerError as error:
            self._servers.drop(server, str(error))

    def _queue(self, generation: Generation, kind: int) -> asyncio.Future[ServerClient | None]:
        first_version = 1 << 62 if generation.first_version is None else generation.first_version
        turn = QueuedGeneration(
            (kind, first_version, next(self._arrivals)), generation, asyncio.get_running_loop().create_future()
        )
        if self._interrupted and kind == TRAINING:
            turn.server.set_result(None)
        else:
            heapq.heappush(self._queued, turn)
            self.proceed()
        return turn.server

    def _choose(self, generation: Generation) -> ServerClient | None:
        """The server with room and the least KV in use; the one that holds the prompt already, if it is not far off."""
        open_ = [server for server in self._servers.live if len(self._held[server]) < server.slots]
        if not open_:
            return None
        index = generation.prompt.index
        home = self._homes.get(index)
        if home in open_ and len(self._held[home]) <= min(len(self._held[server]) for server in open_) + SPREAD:
            return home
        self._homes[index] = min(open_, key=self._load)
        return self._homes[index]

    def _load(self, server: ServerClient) -> int:
        now = asyncio.get_running_loop().time()
        counted, load = self._loads.get(server, (-math.inf, 0))
        if now - counted > REFRESH_SECONDS:
            load = sum(map(_tokens, self._held[server]))
            self._loads[server] = (now, load)
        return load


def _tokens(generation: Generation) -> int:
    """Tokens of KV that a generation takes up."""
    return len(generation.prompt.token_ids) + len(generation)
