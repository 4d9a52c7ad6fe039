"""Memory that two processes of one device see, and the line on which they say what is in it."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.transport.weights.plan import Message
from gspo_megatron.transport.weights.wire import ROUNDS_IN_FLIGHT

log = logging.getLogger(__name__)
PLACES = ROUNDS_IN_FLIGHT + 1
"""Rounds that a mailbox holds: two on the wire, one that the worker unpacks."""


class JsonConnection:
    """One JSON value a line, over a connection of this host."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._reader = connection, connection.makefile("rb")

    def send(self, value: Any) -> None:
        """Send one value."""
        self._socket.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """The next value. Raises OSError when the other end is gone or silent for too long."""
        connection = self._reader.readline()
        if not connection.endswith(b"\n"):
            raise ConnectionResetError("the other end of the hand-over is gone")
        return json.loads(connection)

    def close(self) -> None:
        """End the connection, also for the other end."""
        self._reader.close()
        self._socket.close()


class SharedBuffer:
    """A proxy's end of the hand-over to one worker."""

    def __init__(self, worker: int, rounds: dict[int, list[Message]], dtype: torch.dtype, device: torch.device) -> None:
        self.worker, self.rounds = worker, rounds
        self._lost = False
        sizes = [sum(message.size for message in messages) for messages in rounds.values()]
        self._memory, self.description = share(PLACES, max(sizes, default=0), dtype, device)
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
        sizes = [message.size for message in self.rounds[number]]
        return list(place[: sum(sizes)].split(sizes))

    def hand_over(self, number: int) -> None:
        """Tell the worker that a round is there."""
        if not self._lost and self._connection is not None:
            try:
                self._connection.send(number)
            except OSError as error:
                self._lose(error)

    def finish(self) -> None:
        """Wait until the worker has taken everything."""
        while self._free < PLACES:
            self._await_taken()

    def _await_taken(self) -> None:
        try:
            if not self._lost and self._connection is not None:
                self._connection.receive()
        except OSError as error:
            self._lose(error)
        self._free += 1

    def _lose(self, error: OSError) -> None:
        self._lost = True
        log.warning("worker %d does not take its weights any more: %s", self.worker, error)

    def close(self) -> None:
        """Leave."""
        if self._connection is not None:
            self._connection.close()


def share(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Memory of [rows, columns] that another process of this device can open with the description."""
    shape = [rows, max(columns, 1)]
    if device.type == "cuda":
        return _share_card(torch.empty(shape, dtype=dtype, device=device))
    # Without a name: nothing is left behind, however this process ends.
    handle = os.memfd_create("gspo-mailbox")
    size = shape[0] * shape[1] * dtype.itemsize
    os.ftruncate(handle, size)
    memory = _map(f"/proc/self/fd/{handle}", size, dtype).view(shape)
    return memory, {"file": f"/proc/{os.getpid()}/fd/{handle}", "shape": shape}


def open_shared(description: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory that `share` describes, of another process."""
    shape = description["shape"]
    if device.type == "cuda":
        return _open_card(description, dtype, device)
    return _map(description["file"], shape[0] * shape[1] * dtype.itemsize, dtype).view(shape)


def _map(file: str, size: int, dtype: torch.dtype) -> Tensor:
    storage = torch.UntypedStorage.from_file(file, shared=True, nbytes=size)
    return torch.empty(0, dtype=dtype).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _share_card(memory: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """CUDA IPC by torch's own reductions, whose arguments are numbers and byte strings: no pickle crosses."""
    (_, handle, size, offset, counter, counter_offset, event, waits) = memory.untyped_storage()._share_cuda_()
    return memory, {
        "shape": list(memory.shape),
        "handle": base64.b64encode(handle).decode(),
        "size": size,
        "offset": offset,
        "counter": base64.b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event": base64.b64encode(event).decode(),
        "waits": waits,
    }


def _open_card(description: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index if device.index is not None else torch.cuda.current_device(),
        base64.b64decode(description["handle"]),
        description["size"],
        description["offset"],
        base64.b64decode(description["counter"]),
        description["counter_offset"],
        base64.b64decode(description["event"]),
        description["waits"],
    )
    return torch.empty(0, dtype=dtype, device=device).set_(storage).view(description["shape"])  # pyright: ignore[reportCallIssue, reportArgumentType]
