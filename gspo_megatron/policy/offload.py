"""Host memory of a policy: everything while servers use its device, layer inputs until their backward pass.

Whole storages are emptied and filled again, so that every view of them (Megatron's buffers, their buckets, parameters
in them) stays what it is. The host memory is taken once and used again.

Under full recomputation a stage keeps one tensor a layer and micro-batch in flight, the layer's input. Here it is
copied to pinned memory when autograd saves it and back when the layer is computed again. Both copies are queued on the
computing stream, so that order alone makes them safe: each costs its bytes over the host link, next to a whole layer's
forward or recomputation.

Not Megatron's `fine_grained_activation_offloading`: it learns in the first pass (here one without gradients) how many
micro-batches a step has and what each offloads, takes every later step to be the same, and quietly keeps on the device
what comes beyond it. Here the number differs from step to step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

STATES_DIM = 3
ALIGNMENT = 64
Kept = Tensor | tuple[torch.device, Tensor]


class HostMemory:
    """Storages that are on the device or in host memory."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[UntypedStorage, Tensor]] = {}
        """Host copies by identity of the storage; kept for the next time."""
        self._away: dict[int, int] = {}
        """Sizes in bytes of the storages that are in host memory now."""

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of these tensors to host memory and free them on the device; copied ones are skipped."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        leaving = {
            number: storage for number, storage in storages.items() if number not in self._away and storage.nbytes()
        }
        self._make_room(leaving)
        moved = []
        for number, storage in leaving.items():
            self._away[number] = storage.nbytes()
            moved.append((storage, self._copies[number][1].copy_(_bytes(storage), non_blocking=True)))
        _synchronize(moved)
        for storage, _ in moved:
            storage.resize_(0)

    def _make_room(self, storages: Mapping[int, UntypedStorage]) -> None:
        """Take host memory for what has none yet, as one block: small ones are rounded up to powers of two."""
        new = {
            number: storage
            for number, storage in storages.items()
            if number not in self._copies or self._copies[number][1].numel() != storage.nbytes()
        }
        pinned = any(storage.is_cuda for storage in new.values())
        starts = list(accumulate((_aligned(storage.nbytes()) for storage in new.values()), initial=0))
        block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
        for start, (number, storage) in zip(starts, new.items(), strict=False):
            # The storage itself is kept: its identity must not pass to another one.
            self._copies[number] = storage, block[start : start + storage.nbytes()]

    def give_back(self) -> None:
        """Copy everything back to the device."""
        returned = []
        for number, size in self._away.items():
            storage, copy = self._copies[number]
            storage.resize_(size)
            _bytes(storage).copy_(copy, non_blocking=True)
            returned.append((storage, copy))
        self._away.clear()
        _synchronize(returned)

    def read(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, on the device or in host memory."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._away:
            return tensor
        whole = self._copies[storage._cdata][1].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), whole.storage_offset() + tensor.storage_offset())


def _aligned(size: int) -> int:
    """A size that leaves the next tensor of the block aligned for every type."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(storage: UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]  torch's stubs leave it out


def _synchronize(moved: Sequence[tuple[UntypedStorage, Tensor]]) -> None:
    if any(storage.is_cuda for storage, _ in moved):
        torch.cuda.synchronize()


class Residence:
    """Moves weights and optimizer states of a policy between device and host memory."""

    def __init__(self) -> None:
        self._host = HostMemory()

    def offload_states(self, optimizer: Any, chunks: Sequence[Any]) -> None:
        """Move what only training needs, main weights and moments; gradients are dropped: a step begins with none."""
        # Where the weights are float32 the optimizer steps them themselves.
        weights = {parameter.untyped_storage()._cdata for chunk in chunks for parameter in chunk.parameters()}
        self._host.take(state for state in states_of(optimizer) if state.untyped_storage()._cdata not in weights)
        for buffer in _buffers(chunks):
            buffer.offload_to_cpu(move_params=False, move_grads=True)
        _release()

    def offload_weights(self, chunks: Sequence[Any]) -> None:
        """Move the weights too."""
        self._host.take(parameter for chunk in chunks for parameter in chunk.parameters())
        _release()

    def restore(self, chunks: Sequence[Any]) -> None:
        """Bring everything back."""
        self._host.give_back()
        for buffer in _buffers(chunks):
            buffer.reload_from_cpu(move_params=False, move_grads=True)

    def read(self, tensor: Tensor) -> Tensor:
        """See `HostMemory.read`."""
        return self._host.read(tensor)


def states_of(optimizer: Any) -> Iterator[Tensor]:
    """Everything that Megatron's optimizer keeps on its device: what it steps, and the states of it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer] if optimizer is not None else []):
        inner = part.optimizer
        if inner is None:  # a rank without parameters of this kind
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def bytes_at_rest(device: torch.device) -> dict[str, float]:
    """What all processes hold on this device now, as a metric for the moment when servers and policy are both away."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"device_bytes_at_rest": float(total - free)}


def _buffers(chunks: Sequence[Any]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk.buffers + chunk.expert_parallel_buffers


def _release() -> None:
    """Free the caching allocator's reserve for other processes of the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def offload_inputs(decoder: torch.nn.Module) -> None:
    """Keep in host memory what the layers of a fully recomputed decoder save."""
    forward = decoder.forward

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(to_host, to_device):
            return forward(*args, **kwargs)

    decoder.forward = offloading  # type: ignore[method-assign]


def to_host(tensor: Tensor) -> Kept:
    """A copy of hidden states [T, 1, H]; weights, and the rotary angles [T, 1, 1, d] that all layers share, stay."""
    if tensor.dim() != STATES_DIM:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor, non_blocking=True)


def to_device(kept: Kept) -> Tensor:
    """The tensor on its former device."""
    if isinstance(kept, Tensor):
        return kept
    device, copy = kept
    return copy.to(device, non_blocking=True)
