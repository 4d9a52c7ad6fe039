"""The weight update as a state machine, driven by the trainer's two calls.

    begin    pause every server -> let it join, take its model apart and receive, while the trainer sends
    finish   reception complete -> checksum of what every worker received = the trainer's -> model together, labelled
             -> prefix cache forgotten -> engine runs for the canary only -> probe log-probs = the trainer's -> open

Where servers share the trainer's devices they sleep, weights and KV forgotten, from `sleep` to the next update: their
weights' memory comes back in `begin`, their KV's in `finish`, when the trainer has made room.

A server that fails anywhere is dropped: until a complete update it would serve mixed weights or die. A `begin` that
comes while an update is under way abandons that one and starts over with the servers that are still there.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any, TypeVar

from gspo_megatron.config.schema import WeightUpdateSection
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.models.vllm_layout import ServerLayout

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed token sequence that both sides score after every update."""

    token_ids: list[int]
    """[length] ids."""
    logprobs: list[float]
    """[length - 1], the trainer's log-probs of token_ids[1:] at temperature 1."""


@dataclass(slots=True)
class PendingUpdate:
    """An update between `begin` and `finish`."""

    version: int
    started: float
    receptions: dict[ServerClient, asyncio.Task[list[dict[str, Any]]]] = field(default_factory=dict)
    first_workers: dict[ServerClient, int] = field(default_factory=dict)


class WeightUpdater:
    """Brings new weights to every server of a fleet."""

    def __init__(self, fleet: ServerSet, settings: WeightUpdateSection, host: str, sleeps: bool) -> None:
        """
        Args:
            fleet: the servers.
            settings: bucket size, time limit and the canary's bound.
            host: this controller's address as the trainer and the servers reach it.
            sleeps: servers and trainer take turns on the same devices.
        """
        self.version: int | None = None
        """Version that every live server holds and was checked for; None before the first update and during one."""
        self._newest = -1
        self._fleet = fleet
        self._settings = settings
        self._host = host
        self._sleeps = sleeps
        self._store: Any = None
        self._pending: PendingUpdate | None = None
        self._members: list[ServerClient] = []
        self._terms: dict[str, Any] = {}
        # A server outlives a controller: two controllers must never name two groups alike.
        self._group_prefix = f"weights-{secrets.token_hex(4)}"
        self._group = 0

    async def open_store(self) -> None:
        """Start the rendezvous store of the transfer group."""

        def listen() -> Any:
            from torch.distributed import TCPStore  # 2 s of import, in a thread while the servers start

            return TCPStore(self._host, 0, is_master=True, wait_for_workers=False)

        self._store = await asyncio.to_thread(listen)

    async def sleep(self) -> None:
        """Leave the devices to the trainer until the next update. No answer may be under way."""
        if not self._sleeps:
            raise Refused("these servers have devices of their own and do not sleep; drop this request")
        self.version = None
        await self._each(self._fleet.live, lambda server: server.sleep())

    async def begin(self, version: int, terms: dict[str, Any], devices: Sequence[str] = ()) -> dict[str, Any]:
        """Make every server receive.

        Args:
            version: of the weights that come.
            terms: what the trainer says of them: `architecture`, `dtype` and `trainer` of a `Ticket`.
            devices: [trainer ranks] where each one is, if it hands over to the workers on its device.

        Returns:
            The `Ticket` with which all trainer ranks join the servers.
        """
        if version <= self._newest:
            raise Refused(f"weights of version {version} cannot follow version {self._newest}; versions only grow")
        self.version = None
        self._fleet.take_back()
        if self._pending is not None:
            self._abandon()
        # Another process may answer at an address by now; it must get neither a pause nor a weight.
        await self._each(self._fleet.live, self._fleet.check)
        if self._sleeps:
            await self._each(self._fleet.live, lambda server: server.wake("weights"))
        await self._each(self._fleet.live, lambda server: server.pause())
        layouts = await self._each(self._fleet.live, lambda server: server.layout())
        if devices:
            terms = {**terms, "proxies": await self._proxies(layouts, devices)}
        # A process that was started since the last update, noticed or not, is no member of that one's group.
        fresh = await self._each(list(layouts), lambda server: server.is_fresh())
        members = list(layouts)
        if any(fresh.values()) or members != self._members or terms != self._terms:
            self._members, self._terms, self._group = members, terms, self._group + 1
        settings = self._settings
        ticket = {
            "store_host": self._host,
            "store_port": self._store.port,
            "group": f"{self._group_prefix}-{self._group}",
            "bucket_mib": settings.bucket_mib,
            "timeout": settings.timeout,
            **terms,
            "servers": [asdict(layout) for layout in layouts.values()],
        }
        self._pending = pending = PendingUpdate(version, time.monotonic())
        first = 0
        for server, layout in layouts.items():
            pending.first_workers[server] = first
            reception = server.receive_weights(ticket, first, settings.timeout)
            pending.receptions[server] = asyncio.create_task(reception)
            first += layout.world
        return ticket

    async def finish(self, version: int, checksums: list[int], probes: list[Probe]) -> dict[str, Any]:
        """Check what the servers received, make it their model, check the model, open.

        Args:
            version: as at `begin`.
            checksums: for each worker of the ticket's servers what it must have received.
            probes: what the canary compares.

        Returns:
            `largest` and `mean` |log-prob difference| over all probes and servers, `seconds` since `begin`,
            `transfer_seconds` of the slowest worker, `received_over_needed` of the one that received most in excess,
            and `servers`: the differences by address.
        """
        pending = self._pending
        if pending is None or pending.version != version:
            raise Refused(f"no update to version {version} is under way; call /weights/begin first")
        await asyncio.wait(pending.receptions.values())
        self._pending = None
        received = await self._each(list(pending.receptions), pending.receptions.__getitem__)
        for server, reports in received.items():
            fault = next((report["fault"] for report in reports if "fault" in report), "")
            if fault:
                self._drop(server, f"server {server.url} did not receive the weights: {fault}")
                continue
            first = pending.first_workers[server]
            theirs, ours = [report["checksum"] for report in reports], checksums[first : first + len(reports)]
            if theirs != [str(checksum) for checksum in ours]:
                self._drop(
                    server,
                    f"the workers of server {server.url} received weights with checksums {', '.join(theirs)} where the "
                    f"trainer sent {', '.join(map(str, ours))}; it is not used for version {version}",
                )
        whole = [server for server in received if not server.fault]
        await self._each(whole, lambda server: self._put_together(server, version))
        running = [server for server in whole if not server.fault]
        canaries = await self._each(running, lambda server: self._canary(server, version, probes))
        self.version = self._newest = version
        everywhere = [difference for differences in canaries.values() for difference in differences]
        reports = [report for server in canaries for report in received[server]]
        return {
            **_summary(everywhere),
            "seconds": time.monotonic() - pending.started,
            "transfer_seconds": max(report["seconds"] for report in reports),
            "received_over_needed": max(report["received_bytes"] / report["needed_bytes"] for report in reports),
            "servers": {server.url: _summary(differences) for server, differences in canaries.items()},
        }

    async def _proxies(self, layouts: dict[ServerClient, ServerLayout], devices: Sequence[str]) -> list[int]:
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
        return [next(ranks[name]) for found in names.values() for name in found]

    async def _put_together(self, server: ServerClient, version: int) -> None:
        await server.finish_update(version, self._settings.timeout)
        if self._sleeps:
            await server.wake("kv_cache")
        await server.reset_prefix_cache()
        await server.resume()

    async def _canary(self, server: ServerClient, version: int, probes: list[Probe]) -> list[float]:
        """|log-prob difference| of every probe token; only the canary's own requests reach the server here."""
        differences: list[float] = []
        bound = self._settings.canary_bound
        for number, probe in enumerate(probes):
            theirs = await server.score(probe.token_ids)
            if len(theirs) != len(probe.logprobs):
                raise Refused(
                    f"probe {number} has {len(theirs) + 1} tokens and {len(probe.logprobs)} log-probs; send one fewer"
                )
            for position, (a, b) in enumerate(zip(theirs, probe.logprobs, strict=True), start=1):
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
        self._fleet.drop(server, reason)

    def _abandon(self) -> None:
        """Forget an update that broke on the way; its servers are still paused and get a complete one."""
        assert self._pending is not None
        for reception in self._pending.receptions.values():
            reception.cancel()
        self._pending = None
        self._members = []


def _summary(differences: list[float]) -> dict[str, float]:
    if not differences:
        return {"largest": math.nan, "mean": math.nan}
    return {"largest": max(differences), "mean": sum(differences) / len(differences)}
