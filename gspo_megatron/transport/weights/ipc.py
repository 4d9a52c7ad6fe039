"""A weight update where servers share the trainer's devices: slices travel between trainer ranks only, and each rank
hands over what is for the workers on its own device, in memory that both processes map.

Two ranks of one NCCL group cannot be on the same GPU, so a worker cannot be a rank beside the trainer's. Its **proxy**,
the trainer rank on its device, receives for it, straight into a shared buffer: memory of the device that the worker has
opened (CUDA IPC; shared memory where there is no GPU). Over a loopback connection the proxy reports which round is
there and the worker which one it has taken; its end means that the other side is gone. A worker that ends does not stop
the exchange: its proxy takes part to the end, all others get everything, and the controller takes its server out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import PrefixStore

from gspo_megatron.transport.auth import is_same_key, read_key
from gspo_megatron.transport.update_messages import RoundNumber, SharedMemory, UpdateTicket, WorkerGreeting
from gspo_megatron.transport.weights.plan import Message
from gspo_megatron.transport.weights.shared_memory import PLACES, JsonConnection, SharedBuffer, open_shared
from gspo_megatron.transport.weights.wire import (
    JOIN_SECONDS,
    ROUNDS_IN_FLIGHT,
    BufferTransfer,
    GroupReceiveChannel,
    GroupSendChannel,
    ReceiveChannel,
    SendChannel,
    TransferError,
    Wire,
    in_rounds,
    open_store,
    plan_of,
)
from gspo_megatron.transport.wire_message import MessageError

LOOPBACK = "127.0.0.1"


def device_name(device: torch.device) -> str:
    """The same in every process that can hand memory of this device over, and in no other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # The hand-over goes through the loopback interface: of the same network namespace.
    network = os.readlink("/proc/self/ns/net")
    card = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "host"
    return f"{boot} {network} {card}"


def open_send_channel(ticket: UpdateTicket, device: torch.device, rank: int) -> SendChannel:
    """A trainer rank's end, by the way that the ticket names."""
    return RelaySendChannel(ticket, device, rank) if ticket.proxies else GroupSendChannel(ticket, device, rank)


def open_receive_channel(ticket: UpdateTicket, device: torch.device, worker: int) -> ReceiveChannel:
    """A worker's end, by the way that the ticket names."""
    return (
        SharedMemoryReceiveChannel(ticket, device, worker)
        if ticket.proxies
        else GroupReceiveChannel(ticket, device, worker)
    )


class RelaySendChannel:
    """A `SendChannel` in a group of trainer ranks alone, which hands over to the workers on its device."""

    def __init__(self, ticket: UpdateTicket, device: torch.device, rank: int) -> None:
        """Join, and let the workers in; returns when everybody is there."""
        self.name, self.plan, self.device = ticket.group, plan_of(ticket), device
        self._rank, self._proxies = rank, ticket.proxies
        mine = [worker for worker, proxy in enumerate(ticket.proxies) if proxy == rank]
        self._buffers = [SharedBuffer(worker, in_rounds(self.plan.to_receive(worker)), device) for worker in mine]
        outgoing = in_rounds(self.plan.to_send(rank))
        numbers = sorted({*outgoing, *(number for buffer in self._buffers for number in buffer.rounds)})
        self.rounds = {number: outgoing.get(number, []) for number in numbers}
        store = open_store(ticket)
        if self._buffers:
            self._accept_workers(store, ticket)
        self._wire = Wire(ticket, store, device, rank, self.plan.trainer.world)
        self._in_flight: list[int] = []

    def _accept_workers(self, store: PrefixStore, ticket: UpdateTicket) -> None:
        """Wait for every worker's connection; raises TransferError if one does not come."""
        waiting = {buffer.worker: buffer for buffer in self._buffers}
        with socket.create_server((LOOPBACK, 0)) as listener:
            listener.settimeout(min(ticket.timeout, JOIN_SECONDS))
            for worker in waiting:
                store.set(f"worker-{worker}", str(listener.getsockname()[1]))
            while waiting:
                try:
                    connection = JsonConnection(listener.accept()[0], ticket.timeout)
                    greeting = self._greeting(connection)
                except OSError as error:
                    missing = ", ".join(str(worker) for worker in waiting)
                    raise TransferError(f"worker {missing} did not come for its weights: {error}") from None
                if greeting is not None and greeting.worker in waiting:
                    waiting.pop(greeting.worker).connect(connection)
                else:
                    connection.close()

    @staticmethod
    def _greeting(connection: JsonConnection) -> WorkerGreeting | None:
        """Who connects; None for a process that is not of this job."""
        try:
            greeting = connection.receive(WorkerGreeting)
        except MessageError:
            return None
        return greeting if is_same_key(read_key(), greeting.key) else None

    def send(self, number: int, packed: list[tuple[Message, Tensor]]) -> None:
        """See `SendChannel`: what goes to a worker of this rank is copied, what goes elsewhere is sent to its proxy."""
        own = {message.peer: data for message, data in packed if self._proxies[message.peer] == self._rank}
        # Both ends go through a round by worker: messages between two ranks meet in this order.
        transfers = [
            BufferTransfer(message, data, self._proxies[message.peer], self._tag(number, message.peer), leaves=True)
            for message, data in packed
            if message.peer not in own
        ]
        for buffer in self._buffers:
            for message, place in self._places(buffer, number):
                if message.peer == self._rank:
                    place.copy_(own[buffer.worker])
                else:
                    transfers.append(
                        BufferTransfer(message, place, message.peer, self._tag(number, buffer.worker), leaves=False)
                    )
        self._wire.start(transfers)
        self._in_flight.append(number)
        self._deliver(ROUNDS_IN_FLIGHT)

    def _places(self, buffer: SharedBuffer, number: int) -> Iterator[tuple[Message, Tensor]]:
        if number in buffer.rounds:
            yield from zip(buffer.rounds[number], buffer.views(number), strict=True)

    def _tag(self, number: int, worker: int) -> int:
        return number * self.plan.workers + worker

    def _deliver(self, most_left: int) -> None:
        """Hand over the rounds that have arrived, until at most `most_left` are in flight."""
        for _ in self._wire.finish(most_left):
            pass
        while len(self._in_flight) > most_left:
            number = self._in_flight.pop(0)
            if self.device.type == "cuda":
                # The worker reads in a stream of its own.
                torch.cuda.current_stream(self.device).synchronize()
            for buffer in self._buffers:
                if number in buffer.rounds:
                    buffer.hand_over(number)

    def finish(self) -> None:
        """See `SendChannel`."""
        self._deliver(0)
        for buffer in self._buffers:
            buffer.finish()

    def close(self) -> None:
        """See `SendChannel`."""
        for buffer in self._buffers:
            buffer.close()
        self._wire.close()


class SharedMemoryReceiveChannel:
    """A `ReceiveChannel` that its proxy fills."""

    def __init__(self, ticket: UpdateTicket, device: torch.device, worker: int) -> None:
        """Open the memory that the proxy offers."""
        self.name, self.plan, self.device = ticket.group, plan_of(ticket), device
        self.rounds = in_rounds(self.plan.to_receive(worker))
        try:
            port = int(open_store(ticket).get(f"worker-{worker}"))
            self._connection = JsonConnection(
                socket.create_connection((LOOPBACK, port), timeout=ticket.timeout), ticket.timeout
            )
            self._connection.send(WorkerGreeting(key=read_key(), worker=worker))
            self._memory = open_shared(self._connection.receive(SharedMemory), device)
        except (OSError, MessageError) as error:
            raise TransferError(f"trainer rank {ticket.proxies[worker]} hands nothing over: {error}") from None

    def arrivals(self) -> Iterator[tuple[Message, Tensor]]:
        """See `ReceiveChannel`."""
        for index, (number, messages) in enumerate(self.rounds.items()):
            try:
                received = self._connection.receive(RoundNumber).number
            except (OSError, MessageError) as error:
                raise TransferError(f"the trainer stopped handing weights over: {error}") from None
            if received != number:
                raise TransferError(f"the trainer hands over round {received} where round {number} is due")
            sizes = [message.num_bytes for message in messages]
            yield from zip(messages, self._memory[index % PLACES][: sum(sizes)].split(sizes), strict=True)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._connection.send(RoundNumber(number=number))

    def close(self) -> None:
        """See `ReceiveChannel`."""
        self._connection.close()
