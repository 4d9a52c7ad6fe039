"""The wire of a weight update: a process group of trainer rank 0 and all server workers, packed broadcasts, checksums.

Torch only: the trainer side (`WeightSender`) must not import vllm, the server side must not import megatron.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from gspo_megatron.weights.buckets import ITEM_BYTES, Bucket, TensorMeta, plan_buckets

DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES}
WORDS = {4: torch.int32, 2: torch.int16}
MASK = (1 << 64) - 1
CHUNK = 1 << 22
"""Values summed at a time: bounds the int64 temporaries of a checksum to 64 MiB."""


class TransferError(RuntimeError):
    """A weight update that broke on the wire or in what was handed to it; one sentence."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where sender and receivers of weight updates meet; `POST /weights/begin` answers with one."""

    store_host: str
    """Host of the rendezvous store, which lives in the controller."""
    store_port: int
    """Its port."""
    world_size: int
    """1 (trainer rank 0) + all workers of all servers that take part."""
    group: str
    """Name of the process group; a group that both sides still hold under this name is used again."""
    bucket_mib: int
    """Most bytes of one broadcast, MiB."""
    timeout: float
    """Seconds that joining, and one broadcast, may take."""


class TransferGroup:
    """A process group beside torch.distributed's default one, whose state it never touches."""

    def __init__(self, ticket: Ticket, rank: int, device: torch.device) -> None:
        self.name = ticket.group
        timeout = timedelta(seconds=ticket.timeout)
        store = TCPStore(ticket.store_host, ticket.store_port, is_master=False, wait_for_workers=False, timeout=timeout)
        prefixed = PrefixStore(ticket.group, store)
        self.group: Any  # a ProcessGroup, which torch's own stubs do not know its two subclasses to be
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = ProcessGroupNCCL(prefixed, rank, ticket.world_size, options)
        else:
            self.group = ProcessGroupGloo(prefixed, rank, ticket.world_size, timeout)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Rank 0's bytes into everybody's buffer."""
        options = BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([buffer], options).wait()


def content_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Scalar int64 on the tensor's device: its values as integers, weighted by their position, summed mod 2**64."""
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, dtype=torch.int64, device=tensor.device)
        total += (part * weights.mul_(0x1E3779B97F4A7C15)).sum()
    return total


def _mix(value: int) -> int:
    """Scatter 64 bits (the finalizer of splitmix64), so that a sum of mixed values does not cancel."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


class Checksum:
    """Order-independent checksum of named tensors; sums stay on the device until `value` is asked for."""

    def __init__(self) -> None:
        self._labels: list[str] = []
        self._sums: list[torch.Tensor] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count a tensor in: its name, type, shape and values."""
        self._labels.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        self._sums.append(content_sum(tensor))

    def value(self) -> int:
        """The checksum in 0..2**64-1 of what was added, in whichever order."""
        sums = torch.stack(self._sums).tolist() if self._sums else []
        labels = (hashlib.blake2b(label.encode(), digest_size=8).digest() for label in self._labels)
        return sum(_mix((int.from_bytes(d) + s) & MASK) for d, s in zip(labels, sums, strict=True)) & MASK


def tensor_checksum(name: str, tensor: torch.Tensor) -> int:
    """Checksum of one named tensor; those of several add up mod 2**64 to that of all."""
    checksum = Checksum()
    checksum.add(name, tensor)
    return checksum.value()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class WeightSender:
    """Trainer rank 0's end; kept for the whole run, so that an unchanged set of servers keeps its connections."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._group: TransferGroup | None = None

    def send(
        self, ticket: dict[str, Any], manifest: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> int:
        """Broadcast all tensors to the servers.

        Args:
            ticket: the answer of `ControllerLink.begin_update`.
            manifest: what is sent, in the order of `tensors`.
            tensors: whole logical tensors of the manifest's types and shapes, on `device`.

        Returns:
            The checksum of what was sent, for `ControllerLink.finish_update`.

        Raises:
            TransferError: a server was lost, or a tensor is not what the manifest says.
        """
        terms = Ticket(**ticket)
        checksum = Checksum()
        try:
            if self._group is None or self._group.name != terms.group:
                self.close()
                self._group = TransferGroup(terms, 0, self.device)
            source = _checked(manifest, tensors, checksum)
            for buffer in pack(manifest, plan_buckets(manifest, terms.bucket_mib), source, self.device):
                self._group.broadcast(buffer)
        except TransferError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            reason = str(error).splitlines()[0]
            raise TransferError(f"the weight update broke between the trainer and the servers: {reason}") from error
        return checksum.value()

    def close(self) -> None:
        """Leave the group; a server that still waits for a broadcast sees the connection close and fails its update."""
        self._group = None


def _checked(
    manifest: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]], checksum: Checksum
) -> Iterator[torch.Tensor]:
    """The tensors, each held against the manifest and counted into the checksum."""
    pairs = iter(tensors)
    for meta in manifest:
        name, tensor = next(pairs, (None, None))
        if name is None or tensor is None:
            raise TransferError(f"the weights end before tensor {meta.name}; the manifest lists it")
        if (name, tensor.dtype, tuple(tensor.shape)) != (meta.name, DTYPES[meta.dtype], meta.shape):
            raise TransferError(
                f"tensor {name} {tensor.dtype} {tuple(tensor.shape)} came where the manifest lists "
                f"{meta.name} {meta.dtype} {meta.shape}; both must follow one order"
            )
        checksum.add(name, tensor)
        yield tensor
    extra = next(pairs, None)
    if extra is not None:
        raise TransferError(f"tensor {extra[0]} is not in the manifest; list it or do not send it")


def pack(
    manifest: Sequence[TensorMeta], buckets: Sequence[Bucket], tensors: Iterator[torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """Buckets as uint8 [num_bytes], filled from the tensors; at most one tensor and one bucket are held at a time."""
    index, data = -1, torch.empty(0)
    for bucket in buckets:
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=device)
        for piece in bucket.pieces:
            while index < piece.tensor:
                index, data = index + 1, _as_bytes(next(tensors))
            buffer[piece.offset : piece.offset + piece.stop - piece.start].copy_(data[piece.start : piece.stop])
        yield buffer
    if next(tensors, None) is not None:
        raise TransferError("more tensors came than the manifest lists")


def unpack(
    manifest: Sequence[TensorMeta], buckets: Sequence[Bucket], group: TransferGroup, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Receive every bucket and give out whole tensors: views of a bucket, or a copy where a tensor was cut.

    Buckets are not used again, because vLLM's layerwise loader keeps the views until a layer is complete.
    """
    partial = torch.empty(0)
    for bucket in buckets:
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
        group.broadcast(buffer)
        for piece in bucket.pieces:
            meta = manifest[piece.tensor]
            data = buffer[piece.offset : piece.offset + piece.stop - piece.start]
            if len(data) < meta.num_bytes:
                if piece.start == 0:
                    partial = torch.empty(meta.num_bytes, dtype=torch.uint8, device=device)
                partial[piece.start : piece.stop].copy_(data)
                data = partial
            if piece.stop == meta.num_bytes:
                yield meta.name, data.view(DTYPES[meta.dtype]).view(meta.shape)
