"""The wire: checksums that see what matters and nothing else, and a real gloo group of two threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from gspo_megatron.rollout import transfer
from gspo_megatron.rollout.transfer import (
    Checksum,
    Ticket,
    TransferError,
    TransferGroup,
    WeightSender,
    tensor_checksum,
    unpack,
)
from gspo_megatron.weights.buckets import TensorMeta, plan_buckets

CPU = torch.device("cpu")


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (300, 1000), "norm": (77,), "proj": (64, 33), "head": (512, 1024)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["half"] = torch.randn(129, generator=generator).bfloat16()
    return tensors


def make_manifest(tensors: dict[str, torch.Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]


def checksum_of(pairs: list[tuple[str, torch.Tensor]]) -> int:
    checksum = Checksum()
    for name, tensor in pairs:
        checksum.add(name, tensor)
    return checksum.value()


def test_the_order_of_tensors_does_not_matter_and_sums_add_up() -> None:
    pairs = list(make_tensors().items())
    value = checksum_of(pairs)
    random.Random(0).shuffle(pairs)
    assert checksum_of(pairs) == value == sum(tensor_checksum(*pair) for pair in pairs) % 2**64


def test_everything_else_matters() -> None:
    first = torch.arange(1.0, 13.0).view(3, 4)
    second = torch.arange(2.0, 14.0).view(3, 4)
    value = checksum_of([("a", first), ("b", second)])
    changed = first.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(100.0))
    swapped = first.clone()
    swapped[0, 0], swapped[2, 3] = first[2, 3], first[0, 0]
    others = [
        [("a", changed), ("b", second)],
        [("a", swapped), ("b", second)],
        [("a", second), ("b", first)],
        [("a", first.view(4, 3)), ("b", second)],
        [("a", first.t().contiguous().view(3, 4)), ("b", second)],
        [("a", first), ("c", second)],
        [("a", first)],
        [("a", first), ("b", second), ("b", second)],
        [("a", -first), ("b", second)],
    ]
    values = [checksum_of(pairs) for pairs in others]
    assert value not in values and len(set(values)) == len(values)


def test_a_view_counts_by_its_values_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(40, 50)
    value = tensor_checksum("a", base.t())
    assert tensor_checksum("a", base.t().contiguous()) == value
    monkeypatch.setattr(transfer, "CHUNK", 7)
    assert tensor_checksum("a", base.t()) == value


@pytest.fixture
def ticket() -> Iterator[Ticket]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    yield Ticket("127.0.0.1", store.port, world_size=3, group="test", bucket_mib=1, timeout=10)
    del store


def receive(ticket: Ticket, rank: int, manifest: list[TensorMeta], rounds: int) -> list[dict[str, torch.Tensor]]:
    group = TransferGroup(ticket, rank, CPU)
    buckets = plan_buckets(manifest, ticket.bucket_mib)
    return [dict(unpack(manifest, buckets, group, CPU)) for _ in range(rounds)]


def test_two_receivers_get_what_was_sent_twice_over_one_group(ticket: Ticket) -> None:
    tensors = make_tensors()
    manifest = make_manifest(tensors)
    assert len(plan_buckets(manifest, 1)) >= 4
    sender = WeightSender(CPU)
    with ThreadPoolExecutor(2) as pool:
        receivers = [pool.submit(receive, ticket, rank, manifest, 2) for rank in (1, 2)]
        sums = [sender.send(asdict(ticket), manifest, tensors.items()) for _ in range(2)]
        results = [receiver.result(30) for receiver in receivers]
    for received in (once for rounds in results for once in rounds):
        assert checksum_of(list(received.items())) == sums[0] == sums[1]
        assert all(torch.equal(received[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda t: {**t, "proj": t["proj"].double().float().t()}, "tensor proj torch.float32 .33, 64. came where"),
        (lambda t: {**t, "norm": t["norm"].bfloat16()}, "tensor norm torch.bfloat16 .77,. came where"),
        (lambda t: {name: t[name] for name in reversed(t)}, "tensor half .* came where the manifest lists embed"),
        (lambda t: {name: t[name] for name in list(t)[:3]}, "the weights end before tensor head"),
        (lambda t: {**t, "more": t["norm"]}, "tensor more is not in the manifest"),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(ticket: Ticket, wrong, sentence: str) -> None:
    tensors = make_tensors()
    manifest = make_manifest(tensors)
    sender = WeightSender(CPU)
    with ThreadPoolExecutor(2) as pool:
        receivers = [pool.submit(receive, ticket, rank, manifest, 1) for rank in (1, 2)]
        with pytest.raises(TransferError, match=sentence):
            sender.send(asdict(ticket), manifest, wrong(tensors).items())
        faults = [receiver.exception(30) for receiver in receivers]
    # Too many tensors are noticed after the last byte; in all other cases the receivers see the connection close.
    assert sentence.startswith("tensor more") or all(isinstance(fault, RuntimeError) for fault in faults)


def test_a_lost_receiver_is_a_sentence(ticket: Ticket) -> None:
    tensors = make_tensors()
    manifest = make_manifest(tensors)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(receive, ticket, 1, manifest, 1)
        pool.submit(lambda: TransferGroup(ticket, 2, CPU) and None)
        with pytest.raises(TransferError, match="the weight update broke between the trainer and the servers"):
            sender = WeightSender(CPU)
            for _ in range(3):
                sender.send(asdict(ticket), manifest, tensors.items())
