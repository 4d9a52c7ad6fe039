"""The wire over NCCL, whose group is a fake one: a lost server is an error of ours, in time, and the process lives."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.update_messages import UpdateTicket, WeightTerms
from gspo_megatron.transport.weights import wire
from gspo_megatron.transport.weights.nccl_group import NO_WATCHDOG
from gspo_megatron.transport.weights.plan import Message
from gspo_megatron.transport.weights.wire import BufferTransfer, Wire
from tests.shards import ARCH

CUDA = torch.device("cuda", 0)


class FakeWork:
    """Done after it was asked so many times; never, if None."""

    def __init__(self, group: FakeGroup) -> None:
        self.group, self.asked, self.waited = group, 0, False

    def is_completed(self) -> bool:
        self.asked += 1
        return self.group.polls is not None and self.asked > self.group.polls

    def wait(self) -> None:
        # NCCL's own only orders streams, whether the transfer is done or not.
        self.waited = True


class FakeGroup:
    """In the place of torch's ProcessGroupNCCL, which needs a GPU."""

    polls: int | None = None
    made: list[FakeGroup]

    class Options:
        _timeout = timedelta()

    def __init__(self, *_: Any) -> None:
        self.has_watchdog = os.environ.get(NO_WATCHDOG) != "1"
        self.connected = self.aborted = False
        self.works: list[FakeWork] = []
        self.made.append(self)

    def eager_connect_single_device(self, _: torch.device) -> None:
        self.connected = True

    def set_timeout(self, _: timedelta) -> None: ...

    def _start_coalescing(self) -> None: ...

    def send(self, *_: Any) -> FakeWork:
        return FakeWork(self)

    recv = send

    def _end_coalescing(self) -> FakeWork:
        self.works.append(FakeWork(self))
        return self.works[-1]

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> type[FakeGroup]:
    kind = type("Group", (FakeGroup,), {"made": []})
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", kind)
    monkeypatch.delenv(NO_WATCHDOG, raising=False)
    return kind


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def ticket(timeout: float) -> UpdateTicket:
    terms = WeightTerms(architecture=ARCH, dtype="float32", trainer=Layout(1))
    return UpdateTicket(
        store_host="127.0.0.1", store_port=1, group="test", bucket_mib=1, timeout=timeout, terms=terms,
        servers=(ServerLayout(1),), proxies=(),
    )  # fmt: skip


def join(store: TCPStore, timeout: float, ranks: int = 2, world: int = 2) -> list[Wire]:
    """So many ranks of a group, each in a thread until all have met."""

    def join_as(rank: int) -> Wire:
        own = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        return Wire(ticket(timeout), PrefixStore("test", own), CUDA, rank, world)

    with ThreadPoolExecutor(ranks) as pool:
        return [*pool.map(join_as, range(ranks))]


def slices(peer: int) -> list[BufferTransfer]:
    return [BufferTransfer(Message(peer, 0, (), 0), torch.zeros(2), peer, 0, leaves=True)]


def test_a_round_that_never_ends_is_an_error_within_the_time_limit(group: type[FakeGroup], store: TCPStore) -> None:
    wires = join(store, timeout=0.05, ranks=1, world=1)
    wires[0].start(slices(peer=1))
    with pytest.raises(RuntimeError, match=r"between rank 0 and rank\(s\) 1 of the group was not through after 0.05 s"):
        list(wires[0].finish(0))
    assert not group.made[0].works[0].waited, "its values are not there, and nothing may wait for them"
    wires[0].close()
    assert group.made[0].aborted


def test_no_watchdog_of_torch_ends_the_process(group: type[FakeGroup], store: TCPStore) -> None:
    join(store, timeout=60)
    assert [made.has_watchdog for made in group.made] == [False, False]
    assert NO_WATCHDOG not in os.environ, "other groups of this process keep theirs"


def test_values_are_used_only_when_the_device_is_done(group: type[FakeGroup], store: TCPStore) -> None:
    group.polls = 3
    wires = join(store, timeout=60)
    wires[0].start(slices(peer=1))
    assert [transfer.peer for transfer in wires[0].finish(0)] == [1]
    (work,) = [work for made in group.made for work in made.works]
    assert work.asked == 4 and work.waited


def test_nobody_connects_before_all_have_come(
    group: type[FakeGroup], store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "JOIN_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"not all of the group's 2 ranks joined within 0\.1 s; still absent: 1"):
        join(store, timeout=5, ranks=1)
    assert not any(made.connected for made in group.made)
