"""Storages that go to host memory and come back are what they were, and everything that looks at them too."""

from __future__ import annotations

import torch

from gspo_megatron.policy.offload import HostMemory


def test_views_survive_the_way_there_and_back() -> None:
    buffer = torch.randn(1000)
    first, second = buffer[:600].view(20, 30), buffer[600:]
    alone = torch.randn(7, 5).T
    everything = (buffer, first, second, alone)
    before = [tensor.clone() for tensor in everything]
    memory = HostMemory()
    for _ in range(2):
        memory.take([first, second, alone])
        assert buffer.untyped_storage().nbytes() == 0 == alone.untyped_storage().nbytes()
        assert all(torch.equal(memory.read(now), was) for now, was in zip(everything, before, strict=True))
        memory.take([buffer])  # what is away stays where it is
        memory.give_back()
        assert all(torch.equal(now, was) for now, was in zip(everything, before, strict=True))
        assert first.data_ptr() == buffer.data_ptr()
        buffer += 1
        before = [tensor.clone() for tensor in everything]


def test_what_is_not_away_is_read_where_it_is() -> None:
    tensor = torch.randn(3)
    assert HostMemory().read(tensor) is tensor


def test_the_values_that_come_back_are_those_of_the_last_time() -> None:
    memory, tensor = HostMemory(), torch.zeros(4, dtype=torch.bfloat16)
    for value in (1.0, 2.0):
        tensor.fill_(value)
        memory.take([tensor])
        assert memory.read(tensor)[3] == value
        memory.give_back()
        assert tensor.tolist() == [value] * 4


def test_host_memory_is_one_block() -> None:
    """torch rounds each small block of pinned memory up to a power of two."""
    memory, tensors = HostMemory(), [torch.randn(size) for size in (3, 1000, 77)]
    before = [tensor.clone() for tensor in tensors]
    memory.take(tensors)
    assert len({copy.untyped_storage()._cdata for _, copy in memory._copies.values()}) == 1
    assert all(torch.equal(memory.read(tensor), value) for tensor, value in zip(tensors, before, strict=True))
    memory.give_back()
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, before, strict=True))
