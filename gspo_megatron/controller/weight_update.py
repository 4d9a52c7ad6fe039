"""The weight update as a state machine, driven by the trainer's two calls.

    begin    pause every server -> let it join, take its model apart and receive, while the trainer sends
    finish   reception complete -> checksum of what every worker received = the trainer's -> model together, labelled
             -> prefix cache forgotten -> engine runs for the canary only -> probe log-probs = the trainer's -> open

Where servers share the trainer's devices they sleep, weights and KV forgotten, from `sleep` to the next update: their
weights' memory comes back in `begin`, their KV's in `finish`, when the trainer has made room.

A server that fails anywhere is dropped: until a complete update it would serve mixed weights or die. A `begin` that
comes while an update is in flight abandons that one and starts over with the servers that are still there.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, TypeVar

from gspo_megatron.config.schema import WeightUpdateSection
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.transport.messages import Empty
from gspo_megatron.transport.update_messages import (
    CanaryReport,
    JoinRequest,
    Probe,
    UpdateCheck,
    UpdateReport,
    UpdateRequest,
    UpdateTicket,
    WeightTerms,
    WorkerLayout,
    WorkerReport,
)

if TYPE_CHECKING:  # 2 s of import
    from torch.distributed import TCPStore

T = TypeVar("T")


@dataclass(slots=True)
class PendingUpdate:
    """An update between `begin` and `finish`."""

    version: int
    started: float
    receptions: dict[ServerClient, asyncio.Task[list[WorkerReport]]] = field(default_factory=dict)
    first_workers: dict[ServerClient, int] = field(default_factory=dict)
    """Number of each server's worker 0 among all workers."""


class WeightUpdater:
    """Brings new weights to every server of a run."""

    def __init__(
        self,
        servers: ServerSet,
        settings: WeightUpdateSection,
        host: str,
        sleeps: bool,
        on_open: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            servers: all servers of the run.
            settings: bucket size, time limit and the canary's bound.
            host: this controller's address as the trainer and the servers reach it.
            sleeps: servers and trainer take turns on the same devices.
            on_open: called when a new version serves.
        """
        self.version: int | None = None
        """Version that every live server holds and was checked for; None before the first update and during one."""
        self.receiving: int | None = None
        """Version of the update between its `begin` and its successful `finish`."""
        self._newest = -1
        self._servers = servers
        self._on_open = on_open
        self._settings = settings
        self._host = host
        self._sleeps = sleeps
        self._store: TCPStore | None = None
        self._pending: PendingUpdate | None = None
        self._members: list[ServerClient] = []
        self._terms: tuple[WeightTerms, tuple[int, ...]] | None = None
        # A server outlives a controller: two controllers must never name two groups alike.
        self._group_prefix = f"weights-{secrets.token_hex(4)}"
        self._group = 0

    async def open_store(self) -> None:
        """Start the rendezvous store of the transfer group."""

        def listen() -> TCPStore:
            from torch.distributed import TCPStore  # in a thread while the servers start

            return TCPStore(self._host, 0, is_master=True, wait_for_workers=False)

        self._store = await asyncio.to_thread(listen)

    async def adopt(self) -> None:
        """Serve with the weights that the servers have loaded themselves, as version 0."""
        await self._each(self._servers.live, lambda server: server.label(0))
        self.version = self._newest = 0

    async def sleep(self, request: Empty) -> Empty:
        """Leave the devices to the trainer until the next update. No generation may be in flight."""
        if not self._sleeps:
            raise Refused("these servers have devices of their own and do not sleep; drop this request")
        self.version = None
        await self._each(self._servers.live, lambda server: server.sleep())
        self.receiving = None
        return request

    async def begin(self, request: UpdateRequest) -> UpdateTicket:
        """Make every server receive; all trainer ranks join the servers with the ticket."""
        if request.version <= self._newest:
            raise Refused(
                f"weights of version {request.version} cannot follow version {self._newest}; versions only grow"
            )
        self.receiving, self.version = request.version, None
        self._servers.take_back()
        if self._pending is not None:
            self._abandon()
        # Another process may answer at an address by now; it must get neither a pause nor a weight.
        await self._each(self._servers.live, self._servers.check)
        if self._sleeps:
            await self._each(self._servers.live, lambda server: server.wake("weights"))
        await self._each(self._servers.live, lambda server: server.pause())
        layouts = await self._each(self._servers.live, lambda server: server.layout())
        proxies = await self._proxies(layouts, request.devices) if request.devices else ()
        await self._choose_group(list(layouts), (request.terms, proxies))
        assert self._store is not None
        settings = self._settings
        ticket = UpdateTicket(
            store_host=self._host,
            store_port=self._store.port,
            group=f"{self._group_prefix}-{self._group}",
            bucket_mib=settings.bucket_mib,
            timeout=settings.timeout,
            terms=request.terms,
            servers=tuple(layout.layout for layout in layouts.values()),
            proxies=proxies,
        )
        self._pending = pending = PendingUpdate(request.version, time.monotonic())
        first = 0
        for server, layout in layouts.items():
            pending.first_workers[server] = first
            reception = server.receive_weights(JoinRequest(ticket=ticket, first_worker=first), settings.timeout)
            pending.receptions[server] = asyncio.create_task(reception)
            first += layout.layout.world
        return ticket

    async def _choose_group(self, members: list[ServerClient], terms: tuple[WeightTerms, tuple[int, ...]]) -> None:
        """Name another transfer group unless all members still hold the last one."""
        # A process that was started since the last update, noticed or not, is no member of that one's group.
        fresh = await self._each(members, lambda server: server.is_fresh())
        if any(fresh.values()) or members != self._members or terms != self._terms:
            self._members, self._terms, self._group = members, terms, self._group + 1

    async def finish(self, request: UpdateCheck) -> UpdateReport:
        """Check what the servers received, make it their model, check the model, open."""
        version, pending = request.version, self._pending
        if pending is None or pending.version != version:
            raise Refused(f"no update to version {version} is in flight; call /weights/begin first")
        await asyncio.wait(pending.receptions.values())
        self._pending = None
        received = await self._each(list(pending.receptions), pending.receptions.__getitem__)
        for server, reports in received.items():
            first = pending.first_workers[server]
            self._check_reception(server, version, reports, request.checksums[first : first + len(reports)])
        whole = [server for server in received if not server.fault]
        await self._each(whole, lambda server: self._put_together(server, version))
        running = [server for server in whole if not server.fault]
        canaries = await self._each(running, lambda server: self._canary(server, version, request.probes))
        self.version = self._newest = version
        self.receiving = None
        self._on_open()
        reports = [report for server in canaries for report in received[server]]
        overall = _summary([difference for differences in canaries.values() for difference in differences])
        return UpdateReport(
            largest=overall.largest,
            mean=overall.mean,
            seconds=time.monotonic() - pending.started,
            transfer_seconds=max(report.seconds for report in reports),
            received_over_needed=max(report.received_bytes / report.needed_bytes for report in reports),
            servers={server.url: _summary(differences) for server, differences in canaries.items()},
        )

    def _check_reception(
        self, server: ServerClient, version: int, reports: Sequence[WorkerReport], checksums: Sequence[int]
    ) -> None:
        """Drop a server whose workers did not receive exactly what the trainer sent."""
        fault = next((report.fault for report in reports if report.fault), "")
        received, sent = [report.checksum for report in reports], [str(checksum) for checksum in checksums]
        if fault:
            self._drop(server, f"server {server.url} did not receive the weights: {fault}")
        elif received != sent:
            self._drop(
                server,
                f"the workers of server {server.url} received weights with checksums {', '.join(received)} where the "
                f"trainer sent {', '.join(sent)}; it is not used for version {version}",
            )

    async def _proxies(self, layouts: dict[ServerClient, WorkerLayout], devices: Sequence[str]) -> tuple[int, ...]:
        """[workers] a trainer rank on each worker's device; those of one device take its workers in turn."""
        names = await self._each(list(layouts), lambda server: server.device_names())
        for server in [server for server in layouts if server not in names]:
            del layouts[server]
        ranks = {name: cycle([rank for rank, at in enumerate(devices) if at == name]) for name in set(devices)}
        alone = {server: set(found) - ranks.keys() for server, found in names.items()}
        for server in [server for server, strangers in alone.items() if strangers]:
            self._drop(
                server,
                f"a worker of server {server.url} is on a device with no trainer rank ({min(alone[server])}), which "
                "could hand it its weights; set placement.rollout_nodes to the number of nodes that only run servers",
            )
            del layouts[server], names[server]
        return tuple(next(ranks[name]) for found in names.values() for name in found)

    async def _put_together(self, server: ServerClient, version: int) -> None:
        await server.finish_update(version, self._settings.timeout)
        if self._sleeps:
            await server.wake("kv_cache")
        await server.reset_prefix_cache()
        await server.resume()

    async def _canary(self, server: ServerClient, version: int, probes: Sequence[Probe]) -> list[float]:
        """|log-prob difference| of every probe token; only the canary's own requests reach the server here."""
        differences: list[float] = []
        bound = self._settings.canary_bound
        # They leave together, so the engine scores them in one pass.
        asked = await asyncio.gather(*(server.score(probe.token_ids) for probe in probes), return_exceptions=True)
        for number, (probe, scores) in enumerate(zip(probes, asked, strict=True)):
            if isinstance(scores, ValueError):
                raise Refused(f"probe {number}: {scores}") from None
            if isinstance(scores, BaseException):
                raise scores
            if len(scores) != len(probe.logprobs):
                raise Refused(
                    f"probe {number} has {len(scores) + 1} tokens and {len(probe.logprobs)} log-probs; send one fewer"
                )
            for position, (a, b) in enumerate(zip(scores, probe.logprobs, strict=True), start=1):
                # A NaN compares as false, and must be refused.
                if not abs(a - b) <= bound:
                    raise ServerError(
                        f"the canary refuses version {version} on server {server.url}: the log-prob of probe {number}, "
                        f"token {position} is {a:.6g} there and {b:.6g} in the trainer, a difference above "
                        f"weight_update.canary_bound={bound:g}; the two do not hold the same weights"
                    )
                differences.append(abs(a - b))
        return differences

    async def _each(
        self, servers: list[ServerClient], step: Callable[[ServerClient], Awaitable[T]]
    ) -> dict[ServerClient, T]:
        """Run a step on all servers at once; those that fail are dropped."""
        results = await asyncio.gather(*(step(server) for server in servers), return_exceptions=True)
        done: dict[ServerClient, T] = {}
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, ServerError):
                self._drop(server, str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                done[server] = result
        return done

    def _drop(self, server: ServerClient, reason: str) -> None:
        # The group has a dead member now: the next update needs a new one.
        self._members = []
        self._servers.drop(server, reason)

    def _abandon(self) -> None:
        """Forget an update that broke on the way; its servers are still paused and get a complete one."""
        assert self._pending is not None
        for reception in self._pending.receptions.values():
            reception.cancel()
        self._pending = None
        self._members = []


def _summary(differences: Sequence[float]) -> CanaryReport:
    if not differences:
        return CanaryReport(largest=math.nan, mean=math.nan)
    return CanaryReport(largest=max(differences), mean=sum(differences) / len(differences))
