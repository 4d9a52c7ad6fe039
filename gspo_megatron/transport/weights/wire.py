"""The wire of a weight update: a process group of all trainer ranks and all server workers, in which packed slices go
point to point. Where servers share the trainer's devices, `ipc.py` brings the slices to the workers.

Torch only: the trainer side (`sender.py`) must not import vllm, the server side (`inference/vllm_worker.py`) must not
import megatron.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from gspo_megatron.models.vllm_layout import ServerParameter
from gspo_megatron.transport.update_messages import UpdateTicket
from gspo_megatron.transport.weights.checksum import plane
from gspo_megatron.transport.weights.nccl_group import connect_nccl
from gspo_megatron.transport.weights.plan import Message, TransferPlan

MIB = 1 << 20
JOIN_SECONDS = 60.0
POLL_SECONDS = 0.0005
ROUNDS_IN_FLIGHT = 2
"""While one round is on the wire, the one before is unpacked and the next is packed."""


class TransferError(RuntimeError):
    """A weight update that broke on the wire or in what was handed to it; one sentence."""


def plan_of(ticket: UpdateTicket) -> TransferPlan:
    """What moves where; the same for every process that holds this ticket."""
    terms = ticket.terms
    return TransferPlan(terms.architecture, terms.trainer, ticket.servers, terms.form, ticket.bucket_mib * MIB)


def open_store(ticket: UpdateTicket) -> PrefixStore:
    """The part of the controller's rendezvous store that belongs to a ticket's group."""
    # Whoever dies before it has joined leaves no connection that could end: the others wait this long.
    timeout = timedelta(seconds=min(ticket.timeout, JOIN_SECONDS))
    store = TCPStore(ticket.store_host, ticket.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(ticket.group, store)


def in_rounds(messages: Iterable[Message]) -> dict[int, list[Message]]:
    """Messages by round, in order."""
    return {number: list(group) for number, group in groupby(messages, lambda message: message.round)}


@dataclass(frozen=True, slots=True)
class BufferTransfer:
    """A buffer on its way to or from one other rank of the group."""

    message: Message
    """What is in it."""
    buffer: Tensor
    """[bytes] its values."""
    peer: int
    """The other rank."""
    tag: int
    """Equal at both ends, and no other's between the same two ranks while it is on its way."""
    leaves: bool
    """Whether this end sends it."""


class Wire:
    """A process group of its own, which leaves torch.distributed's default group alone; it carries rounds."""

    def __init__(self, ticket: UpdateTicket, store: PrefixStore, device: torch.device, rank: int, world: int) -> None:
        """Join; returns when everybody has."""
        timeout = timedelta(seconds=min(ticket.timeout, JOIN_SECONDS))
        self.device, self._rank = device, rank
        self._in_flight: deque[tuple[list[Any], list[BufferTransfer]]] = deque()
        self._group: Any  # a ProcessGroup, which torch's own stubs do not know its two subclasses to be
        self._patience = ticket.timeout
        if device.type == "cuda":
            self._group = connect_nccl(store, device, rank, world, timeout)
        else:
            self._group = ProcessGroupGloo(store, rank, world, timeout)
        self._group.set_timeout(timedelta(seconds=ticket.timeout))

    # No local name below may hold the group or what it returns: it would live on in the traceback of a failure, the
    # connections with it, and the other ends would wait for the time limit.

    def start(self, transfers: list[BufferTransfer]) -> None:
        """Put a round on its way: buffers that leave, and those that wait for what comes."""
        self._in_flight.append(([], transfers))
        if self.device.type == "cuda" and transfers:
            # One NCCL group a round: its transfers progress at the same time, over one communicator.
            self._group._start_coalescing()
        for transfer in transfers:
            self._in_flight[-1][0].append(self._post(transfer))
        if self.device.type == "cuda" and transfers:
            self._in_flight[-1][0][:] = [self._group._end_coalescing()]

    def _post(self, transfer: BufferTransfer) -> Any:
        return (self._group.send if transfer.leaves else self._group.recv)(
            [transfer.buffer], transfer.peer, transfer.tag
        )

    def finish(self, most_left: int) -> Iterator[BufferTransfer]:
        """Wait for the oldest rounds until at most `most_left` are in flight; their transfers."""
        while len(self._in_flight) > most_left:
            while self._in_flight[0][0]:
                if self.device.type == "cuda":
                    self._watch_oldest()
                self._in_flight[0][0][-1].wait()
                self._in_flight[0][0].pop()
            yield from self._in_flight.popleft()[1]

    def _watch_oldest(self) -> None:
        """Return when the device has done the oldest round: `wait` of NCCL only puts the streams in order.

        Raises:
            RuntimeError: another rank is gone, or too slow.
        """
        deadline = time.monotonic() + self._patience
        while not self._in_flight[0][0][-1].is_completed():
            if time.monotonic() > deadline:
                peers = ", ".join(map(str, sorted({transfer.peer for transfer in self._in_flight[0][1]})))
                raise RuntimeError(
                    f"a round of slices between rank {self._rank} and rank(s) {peers} of the group was not through "
                    f"after {self._patience:g} s; see what became of the servers in their logs"
                )
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Leave: whoever still waits for this rank sees the connection end."""
        if self.device.type == "cuda":
            self._group.abort()
        self._in_flight.clear()
        self._group = None


class SendChannel(Protocol):
    """A trainer rank's end of an update."""

    name: str
    plan: TransferPlan
    device: torch.device
    rounds: dict[int, list[Message]]
    """What this rank sends, by round; in rounds without messages it only passes on."""

    def send(self, number: int, packed: list[tuple[Message, Tensor]]) -> None:
        """Put a round of messages, each with its bytes, on its way; called for every entry of `rounds`, in order."""
        ...

    def finish(self) -> None:
        """Wait until everything has left."""
        ...

    def close(self) -> None:
        """Leave: whoever still waits for this end sees it go."""
        ...


class ReceiveChannel(Protocol):
    """A worker's end of an update."""

    name: str
    plan: TransferPlan
    device: torch.device
    rounds: dict[int, list[Message]]
    """What this worker receives, by round."""

    def arrivals(self) -> Iterator[tuple[Message, Tensor]]:
        """Every message of an update with its bytes, which are only there until the next one is requested."""
        ...

    def close(self) -> None:
        """Leave: whoever still waits for this end sees it go."""
        ...


class GroupSendChannel:
    """A `SendChannel` in one group with all trainer ranks and all workers."""

    def __init__(self, ticket: UpdateTicket, device: torch.device, rank: int) -> None:
        """Join; returns when everybody has."""
        self.name, self.plan, self.device = ticket.group, plan_of(ticket), device
        self.rounds = in_rounds(self.plan.to_send(rank))
        self._first_worker = self.plan.trainer.world
        world = self._first_worker + self.plan.workers
        self._wire = Wire(ticket, open_store(ticket), device, rank, world)

    def send(self, number: int, packed: list[tuple[Message, Tensor]]) -> None:
        """See `SendChannel`."""
        self._wire.start(
            [
                BufferTransfer(message, data, self._first_worker + message.peer, number, leaves=True)
                for message, data in packed
            ]
        )
        deque(self._wire.finish(ROUNDS_IN_FLIGHT), maxlen=0)

    def finish(self) -> None:
        """See `SendChannel`."""
        deque(self._wire.finish(0), maxlen=0)

    def close(self) -> None:
        """See `SendChannel`."""
        self._wire.close()


class GroupReceiveChannel:
    """A `ReceiveChannel` in one group with all trainer ranks and all workers."""

    def __init__(self, ticket: UpdateTicket, device: torch.device, worker: int) -> None:
        """Join; returns when everybody has."""
        self.name, self.plan, self.device = ticket.group, plan_of(ticket), device
        self.rounds = in_rounds(self.plan.to_receive(worker))
        first = self.plan.trainer.world
        self._wire = Wire(ticket, open_store(ticket), device, first + worker, first + self.plan.workers)

    def arrivals(self) -> Iterator[tuple[Message, Tensor]]:
        """See `ReceiveChannel`; while values are given out, the next rounds are on their way."""
        for number, messages in self.rounds.items():
            buffers = [torch.empty(message.num_bytes, dtype=torch.uint8, device=self.device) for message in messages]
            self._wire.start(
                [
                    BufferTransfer(m, buffer, m.peer, number, leaves=False)
                    for m, buffer in zip(messages, buffers, strict=True)
                ]
            )
            yield from ((transfer.message, transfer.buffer) for transfer in self._wire.finish(ROUNDS_IN_FLIGHT))
        yield from ((transfer.message, transfer.buffer) for transfer in self._wire.finish(0))

    def close(self) -> None:
        """See `ReceiveChannel`."""
        self._wire.close()


def receive(channel: ReceiveChannel, parameters: Iterable[ServerParameter]) -> Iterator[tuple[ServerParameter, Tensor]]:
    """Give out a worker's parameters one by one, each when its last slice has arrived.

    A parameter that was given out is forgotten here: only those of the layers in flight are held.

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
            values[name] = _empty(parameter, channel)
            yield from ready(name)
    for message, data in channel.arrivals():
        sizes = [part.size * channel.plan.form.item_bytes(part.tensor) for part in message.slices]
        for part, part_data in zip(message.slices, data.split(sizes), strict=True):
            name = part.parameter
            if name not in values:
                values[name] = _empty(described[name], channel)
            arrived = as_values(part_data, values[name].dtype)
            plane(values[name], part).copy_(arrived.view(part.height, part.width))
            missing[name] -= part.size
            yield from ready(name)
    if any(missing.values()):
        short = next(name for name, left in missing.items() if left)
        raise TransferError(f"the update ended with {missing[short]} values of {short} missing")


def _empty(parameter: ServerParameter, channel: ReceiveChannel) -> Tensor:
    """Room for a parameter; its padding, which nothing fills, is zero."""
    padded = sum(piece.size for piece in parameter.pieces) < math.prod(parameter.shape)
    make = torch.zeros if padded else torch.empty
    dtype = getattr(torch, channel.plan.form.dtype_of(parameter.name))
    return make(parameter.shape, dtype=dtype, device=channel.device)


def as_values(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as the values that they are; a copy where types of other sizes before them leave them unaligned."""
    return (data.clone() if data.storage_offset() % dtype.itemsize else data).view(dtype)
