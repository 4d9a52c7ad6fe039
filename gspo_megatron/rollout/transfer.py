"""The wire of a weight update: a process group of all trainer ranks and all server workers, in which packed slices go
point to point.

Torch only: the trainer side (`sender.py`) must not import vllm, the server side (`worker.py`) must not import megatron.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from gspo_megatron.config.model import Architecture
from gspo_megatron.rollout.checksum import plane
from gspo_megatron.weights.layout import Layout
from gspo_megatron.weights.manifest import ITEM_BYTES
from gspo_megatron.weights.server_layout import ServerLayout, ServerParameter
from gspo_megatron.weights.transfer_plan import Message, TransferPlan

MIB = 1 << 20
JOIN_SECONDS = 60.0
ROUNDS_IN_FLIGHT = 2
"""While one round is on the wire, the one before is unpacked and the next is packed."""


class TransferError(RuntimeError):
    """A weight update that broke on the wire or in what was handed to it; one sentence."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where the two sides of a weight update meet and what they agreed on; `POST /weights/begin` answers with one."""

    store_host: str
    """Host of the rendezvous store, which lives in the controller."""
    store_port: int
    """Its port."""
    group: str
    """Name of the process group; a group that both sides still hold under this name is used again."""
    bucket_mib: int
    """Most bytes that a worker receives in one round, MiB."""
    timeout: float
    """Seconds that one message may take, and joining if it is less than JOIN_SECONDS."""
    architecture: dict[str, Any]
    """Fields of the trainer's `Architecture`."""
    dtype: str
    """A key of `ITEM_BYTES`: of every value that is sent."""
    trainer: dict[str, Any]
    """Fields of the trainer's `Layout`; its ranks are the first of the group."""
    servers: list[dict[str, Any]]
    """Fields of the `ServerLayout` of each server; their workers follow in this order."""

    def plan(self) -> TransferPlan:
        """What moves where; the same for everybody who holds this ticket."""
        return TransferPlan(
            Architecture.model_validate(self.architecture),
            Layout(**self.trainer),
            [ServerLayout(**server) for server in self.servers],
            ITEM_BYTES[self.dtype],
            self.bucket_mib * MIB,
        )


class TransferGroup:
    """A process group beside torch.distributed's default one, whose state it never touches, with its plan."""

    def __init__(self, ticket: Ticket, device: torch.device, *, trainer: int | None = None, worker: int = 0) -> None:
        """Join as a trainer rank or, without one, as a worker; returns when everybody has joined."""
        self.name, self.plan, self.device = ticket.group, ticket.plan(), device
        self.dtype: torch.dtype = getattr(torch, ticket.dtype)
        # Whoever dies before it has joined leaves no connection that could end: the others wait this long.
        timeout = timedelta(seconds=min(ticket.timeout, JOIN_SECONDS))
        store = TCPStore(ticket.store_host, ticket.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
        prefixed = PrefixStore(ticket.group, store)
        first_worker = self.plan.trainer.world
        rank, world = first_worker + worker if trainer is None else trainer, first_worker + self.plan.workers
        self._peers_from = first_worker if trainer is not None else 0
        messages = self.plan.to_receive(worker) if trainer is None else self.plan.to_send(trainer)
        self.rounds = [(number, list(group)) for number, group in groupby(messages, lambda message: message.round)]
        self._in_flight: deque[tuple[list[Any], list[Message], list[Tensor]]] = deque()
        self._group: Any  # a ProcessGroup, which torch's own stubs do not know its two subclasses to be
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = ProcessGroupNCCL(prefixed, rank, world, options)
        else:
            self._group = ProcessGroupGloo(prefixed, rank, world, timeout)
        self._group.set_timeout(timedelta(seconds=ticket.timeout))

    # No local name below may hold the group or what it returns: it would live on in the traceback of a failure, the
    # connections with it, and the other ends would wait for the time limit.

    def start(self, number: int, messages: list[Message], buffers: list[Tensor]) -> None:
        """Put a round's buffers on the wire, or make them ready for what comes."""
        self._in_flight.append(([], messages, buffers))
        if self.device.type == "cuda":
            # One NCCL group a round: its transfers progress at the same time, over one communicator.
            self._group._start_coalescing()
        for message, buffer in zip(messages, buffers, strict=True):
            self._in_flight[-1][0].append(self._post(self._peers_from + message.peer, buffer, number))
        if self.device.type == "cuda":
            self._in_flight[-1][0][:] = [self._group._end_coalescing()]

    def _post(self, peer: int, buffer: Tensor, tag: int) -> Any:
        return (self._group.send if self._peers_from else self._group.recv)([buffer], peer, tag)

    def finish(self, most_left: int) -> Iterator[tuple[Message, Tensor]]:
        """Wait for the oldest rounds until so many are left in flight; their messages and buffers."""
        while len(self._in_flight) > most_left:
            while self._in_flight[0][0]:
                self._in_flight[0][0][-1].wait()
                self._in_flight[0][0].pop()
            messages, buffers = self._in_flight.popleft()[1:]
            yield from zip(messages, buffers, strict=True)

    def close(self) -> None:
        """Leave: whoever still waits for this rank sees the connection end."""
        if self.device.type == "cuda":
            self._group.abort()
        self._in_flight.clear()
        self._group = None


def receive(group: TransferGroup, parameters: Iterable[ServerParameter]) -> Iterator[tuple[ServerParameter, Tensor]]:
    """Give out a worker's parameters one by one, each when its last slice has arrived.

    A parameter that was given out is forgotten here: on the way are only those of the layers under way.

    Raises:
        TransferError: the plan and the parameters do not fit.
    """
    missing = {parameter.name: sum(piece.size for piece in parameter.pieces) for parameter in parameters}
    described = {parameter.name: parameter for parameter in parameters}
    values: dict[str, Tensor] = {}

    def ready(name: str) -> Iterator[tuple[ServerParameter, Tensor]]:
        if not missing[name]:
            yield described[name], values.pop(name)

    for name, parameter in described.items():
        if not missing[name]:
            values[name] = _empty(parameter, group)
            yield from ready(name)
    for message, buffer in _arrivals(group):
        for part, data in zip(message.slices, buffer.split([part.size for part in message.slices]), strict=True):
            name = part.parameter
            if name not in values:
                values[name] = _empty(described[name], group)
            plane(values[name], part).copy_(data.view(part.height, part.width))
            missing[name] -= part.size
            yield from ready(name)
    if any(missing.values()):
        short = next(name for name, left in missing.items() if left)
        raise TransferError(f"the update ended with {missing[short]} values of {short} missing")


def _arrivals(group: TransferGroup) -> Iterator[tuple[Message, Tensor]]:
    """Every message with its values, while the next rounds are on their way."""
    for number, messages in group.rounds:
        buffers = [torch.empty(message.size, dtype=group.dtype, device=group.device) for message in messages]
        group.start(number, messages, buffers)
        yield from group.finish(ROUNDS_IN_FLIGHT)
    yield from group.finish(0)


def _empty(parameter: ServerParameter, group: TransferGroup) -> Tensor:
    """Room for a parameter; its padding, which nothing fills, is zero."""
    padded = sum(piece.size for piece in parameter.pieces) < math.prod(parameter.shape)
    make = torch.zeros if padded else torch.empty
    return make(parameter.shape, dtype=group.dtype, device=group.device)
