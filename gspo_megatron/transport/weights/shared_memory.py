"""Memory that two processes of one device map, and the connection over which they report its contents."""

from __future__ import annotations

import base64
import logging
import os
import socket

import torch
from torch import Tensor

from gspo_megatron.transport.update_messages import CudaAllocation, RoundNumber, SharedMemory
from gspo_megatron.transport.weights.plan import Message
from gspo_megatron.transport.weights.wire import ROUNDS_IN_FLIGHT
from gspo_megatron.transport.wire_message import MessageError, WireMessage

log = logging.getLogger(__name__)
PLACES = ROUNDS_IN_FLIGHT + 1
"""Rounds that a shared buffer holds: two in flight, one that the worker unpacks."""


class JsonConnection:
    """Messages of known classes, one a line, over a connection within this host."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._reader = connection, connection.makefile("rb")

    def send(self, message: WireMessage) -> None:
        """Send one message."""
        self._socket.sendall(message.to_json().encode() + b"\n")

    def receive[M: WireMessage](self, kind: type[M]) -> M:
        """The next message. Raises OSError when the other end is gone or silent, MessageError for another class."""
        line = self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the other end of the hand-over is gone")
        return kind.from_json(line)

    def close(self) -> None:
        """End the connection, also for the other end."""
        self._reader.close()
        self._socket.close()


class SharedBuffer:
    """A proxy's end of the hand-over to one worker."""

    def __init__(self, worker: int, rounds: dict[int, list[Message]], device: torch.device) -> None:
        self.worker, self.rounds = worker, rounds
        self._lost = False
        sizes = [sum(message.num_bytes for message in messages) for messages in rounds.values()]
        self._memory, self.description = share(PLACES, max(sizes, default=0), device)
        self._index = {number: index for index, number in enumerate(rounds)}
        self._connection: JsonConnection | None = None
        self._free = PLACES

    def connect(self, connection: JsonConnection) -> None:
        """Let the worker in."""
        connection.send(self.description)
        self._connection = connection

    def views(self, number: int) -> list[Tensor]:
        """A place for each message of a round. Waits until the worker has left it."""
        if not self._free:
            self._await_taken()
        self._free -= 1
        place = self._memory[self._index[number] % PLACES]
        sizes = [message.num_bytes for message in self.rounds[number]]
        return list(place[: sum(sizes)].split(sizes))

    def hand_over(self, number: int) -> None:
        """Report a round to the worker."""
        if not self._lost and self._connection is not None:
            try:
                self._connection.send(RoundNumber(number=number))
            except OSError as error:
                self._lose(error)

    def finish(self) -> None:
        """Wait until the worker has taken everything."""
        while self._free < PLACES:
            self._await_taken()

    def _await_taken(self) -> None:
        try:
            if not self._lost and self._connection is not None:
                self._connection.receive(RoundNumber)
        except (OSError, MessageError) as error:
            self._lose(error)
        self._free += 1

    def _lose(self, error: Exception) -> None:
        self._lost = True
        log.warning("worker %d takes no more weights: %s", self.worker, error)

    def close(self) -> None:
        """Leave."""
        if self._connection is not None:
            self._connection.close()


def share(rows: int, columns: int, device: torch.device) -> tuple[Tensor, SharedMemory]:
    """Bytes [rows, columns] that another process of this device can open with the description."""
    shape = (rows, max(columns, 1))
    if device.type == "cuda":
        memory = torch.empty(shape, dtype=torch.uint8, device=device)
        return memory, SharedMemory(shape=shape, cuda=_describe_allocation(memory))
    # Without a name: nothing is left behind, however this process ends.
    handle = os.memfd_create("gspo-weights")
    size = shape[0] * shape[1]
    os.ftruncate(handle, size)
    memory = _map(f"/proc/self/fd/{handle}", size).view(shape)
    return memory, SharedMemory(shape=shape, file=f"/proc/{os.getpid()}/fd/{handle}")


def open_shared(description: SharedMemory, device: torch.device) -> Tensor:
    """The memory that `share` describes, of another process."""
    shape = description.shape
    if description.cuda is not None:
        return _open_allocation(description.cuda, device).view(shape)
    return _map(description.file, shape[0] * shape[1]).view(shape)


def _map(file: str, size: int) -> Tensor:
    storage = torch.UntypedStorage.from_file(file, shared=True, nbytes=size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _describe_allocation(memory: Tensor) -> CudaAllocation:
    """CUDA IPC by torch's own reductions, whose arguments are numbers and byte strings."""
    (_, handle, size, offset, counter, counter_offset, event, waits) = memory.untyped_storage()._share_cuda_()
    return CudaAllocation(
        handle=base64.b64encode(handle).decode(),
        size=size,
        offset=offset,
        counter=base64.b64encode(counter).decode(),
        counter_offset=counter_offset,
        event=base64.b64encode(event).decode(),
        waits=waits,
    )


def _open_allocation(allocation: CudaAllocation, device: torch.device) -> Tensor:
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index if device.index is not None else torch.cuda.current_device(),
        base64.b64decode(allocation.handle),
        allocation.size,
        allocation.offset,
        base64.b64decode(allocation.counter),
        allocation.counter_offset,
        base64.b64decode(allocation.event),
        allocation.waits,
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
