"""The wire, by both ways: real gloo groups of threads, and memory handed over."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from gspo_megatron.models import weight_format
from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.parallel import Layout
from gspo_megatron.transport.update_messages import UpdateRequest, UpdateTicket, WeightTerms
from gspo_megatron.transport.weights.checksum import Checksum, plane
from gspo_megatron.transport.weights.ipc import open_receive_channel, open_send_channel
from gspo_megatron.transport.weights.sender import ATTEMPTS, WeightSender
from gspo_megatron.transport.weights.wire import TransferError, open_store, receive
from tests.shards import ARCH, CPU, TrainerRanks, cut_shards, make_tensors

TRAINER = Layout(4, tensor=2, pipeline=2, expert=2)
SERVERS = [ServerLayout(2), ServerLayout(1, 2), ServerLayout(1)]


@pytest.fixture(params=["one group", "hand-over"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Workers as ranks of the group, or proxies that hand over to them."""
    monkeypatch.setenv("GSPO_JOB_KEY", "unit-test-key")
    return request.param


@pytest.fixture
def make_ticket(way: str) -> Iterator[Any]:
    stores = []

    def make(
        servers: list[ServerLayout] = SERVERS, dtype: str = "float32", trainer: Layout = TRAINER, fp8: bool = False
    ) -> UpdateTicket:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
        stores.append(store)
        terms = WeightTerms(architecture=ARCH, dtype=dtype, trainer=trainer, fp8=fp8)
        workers = sum(server.world for server in servers)
        # Some ranks have no worker, and with many workers some have two.
        proxies = [worker * 3 % trainer.world for worker in range(workers)]
        return UpdateTicket(
            store_host="127.0.0.1",
            store_port=store.port,
            group="test",
            bucket_mib=1,
            timeout=20.0,
            terms=terms,
            servers=tuple(servers),
            proxies=tuple(proxies) if way == "hand-over" else (),
        )

    yield make


def owners(servers: list[ServerLayout]) -> list[tuple[ServerLayout, int]]:
    return [(server, rank) for server in servers for rank in range(server.world)]


def take(ticket: UpdateTicket, worker: int, server: ServerLayout, rank: int, rounds: int) -> list[Any]:
    """What one worker gets in so many updates: (parameters by name, checksum)."""
    group = open_receive_channel(ticket, CPU, worker)
    found = []
    try:
        for _ in range(rounds):
            checksum, held = Checksum(ARCH, group.plan.form, CPU), {}
            for parameter, values in receive(group, group.plan.form.wanted(server_parameters(ARCH, server, rank))):
                held[parameter.name] = values
                for piece in parameter.pieces:
                    checksum.add(0, [piece], plane(values, piece)[None])
            found.append((held, checksum.values()[0]))
    finally:
        group.close()
    return found


def start_workers(pool: ThreadPoolExecutor, ticket: UpdateTicket, rounds: int) -> list[Future[list[Any]]]:
    servers = list(ticket.servers)
    return [pool.submit(take, ticket, n, server, rank, rounds) for n, (server, rank) in enumerate(owners(servers))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workers_of_three_servers_get_their_slices_twice_over_one_group(make_ticket: Any, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    shards = cut_shards(ARCH, TRAINER, tensors)
    ticket = make_ticket(dtype=str(dtype).removeprefix("torch."))
    ranks = TrainerRanks(TRAINER.world)
    with ThreadPoolExecutor(8) as pool:
        workers = start_workers(pool, ticket, 2)
        sums = [ranks.send(ticket, shards) for _ in range(2)]
        results = [worker.result(30) for worker in workers]
    for update in range(2):
        assert [found[update][1] for found in results] == sums[0] == sums[1]
    for (server, rank), found in zip(owners(SERVERS), results, strict=True):
        for parameter in server_parameters(ARCH, server, rank):
            for piece in parameter.pieces:
                rows, columns = slice(*piece.rows), slice(*piece.columns) if piece.columns else slice(None)
                expected = tensors[piece.tensor][rows] if not piece.columns else tensors[piece.tensor][rows, columns]
                assert torch.equal(plane(found[1][0][parameter.name], piece).reshape(expected.shape), expected)


BLOCK = 32


def by_definition(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and scales of a whole matrix, block by block."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // BLOCK) for size in weight.shape])
    for row, column in product(*(range(0, size, BLOCK) for size in weight.shape)):
        block = weight[row : row + BLOCK, column : column + BLOCK].float()
        scale = block.abs().max().clamp(1e-4) / 448
        scales[row // BLOCK, column // BLOCK] = scale
        values[row : row + BLOCK, column : column + BLOCK] = (block * (1.0 / scale)).to(values.dtype)
    return values, scales


@pytest.mark.parametrize(
    "trainer", [TRAINER, Layout(4, context=2, expert=4), Layout(4, tensor=4, expert_tensor=4)], ids=str
)
def test_workers_get_the_bytes_and_scales_of_whole_tensors(
    make_ticket: Any, trainer: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trainer cuts experts into 16 rows, so that a block lies on two of its ranks."""
    monkeypatch.setattr(weight_format, "BLOCK", BLOCK)
    tensors = make_tensors(torch.bfloat16)
    for name in filter(weight_format.is_quantised, list(tensors)):
        # Blocks of other sizes than their neighbours: a scale at the wrong place shows.
        tensors[name] *= torch.exp(3 * torch.randn(tensors[name].shape)).bfloat16()
        values, tensors[name + weight_format.SCALE] = by_definition(tensors[name])
        tensors[name + ".bytes"] = values
    ticket = make_ticket(dtype="bfloat16", trainer=trainer, fp8=True)
    with ThreadPoolExecutor(8) as pool:
        workers = start_workers(pool, ticket, 1)
        sums = TrainerRanks(trainer.world).send(ticket, cut_shards(ARCH, trainer, tensors))
        results = [worker.result(30)[0] for worker in workers]
    assert [checksum for _, checksum in results] == sums
    compared = 0
    for (server, rank), (held, _) in zip(owners(SERVERS), results, strict=True):
        for parameter in ticket.terms.form.wanted(server_parameters(ARCH, server, rank)):
            for piece in parameter.pieces:
                whole = tensors.get(piece.tensor + ".bytes", tensors[piece.tensor])
                rows, columns = slice(*piece.rows), slice(*piece.columns) if piece.columns else slice(None)
                expected = whole[rows] if not piece.columns else whole[rows, columns]
                found = plane(held[parameter.name], piece).reshape(expected.shape)
                assert found.dtype == expected.dtype
                assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
                compared += 1
    assert compared > 500


def test_padding_is_zero(make_ticket: Any) -> None:
    # 96 rows padded to 128 over two ranks: the second holds 32 rows of the model and 32 of nothing.
    servers = [ServerLayout(2)]
    ticket = make_ticket(servers)
    with ThreadPoolExecutor(2) as pool:
        workers = start_workers(pool, ticket, 1)
        TrainerRanks(TRAINER.world).send(ticket, cut_shards(ARCH, TRAINER, make_tensors()))
        embedding = workers[1].result(30)[0][0]["model.embed_tokens.weight"]
    assert embedding.shape == (64, 64) and embedding[:32].any() and not embedding[32:].any()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda shard: shard | {"decoder.final_layernorm.weight": torch.zeros(3)}, "final_layernorm.weight is .*which"),
        (
            lambda shard: {name: value.bfloat16() for name, value in shard.items()},
            "is torch.bfloat16 .*values of torch.float32",
        ),
        (
            lambda shard: {name: value for name, value in shard.items() if "final_layernorm" not in name},
            "the trainer has no parameter decoder.final_layernorm.weight",
        ),
    ],
)
def test_what_the_plan_does_not_say_is_refused(make_ticket: Any, wrong: Any, sentence: str) -> None:
    ticket = make_ticket()
    shards = cut_shards(ARCH, TRAINER, make_tensors())
    with ThreadPoolExecutor(8) as pool:
        workers = start_workers(pool, ticket, 1)
        ranks = TrainerRanks(TRAINER.world)
        with pytest.raises(TransferError, match=sentence):
            ranks.send(ticket, [*shards[:2], *(wrong(shard) for shard in shards[2:])])
        faults = [worker.exception(30) for worker in workers]
    # Everybody who still waits for such a rank sees the connection close.
    assert any(isinstance(fault, RuntimeError) for fault in faults)


@pytest.mark.parametrize("way", ["one group"], indirect=True)
def test_a_lost_worker_is_a_sentence(way: str, make_ticket: Any) -> None:
    ticket = make_ticket([ServerLayout(1), ServerLayout(1)])
    shards = cut_shards(ARCH, TRAINER, make_tensors())
    with ThreadPoolExecutor(2) as pool:
        pool.submit(take, ticket, 0, ServerLayout(1), 0, 9)
        pool.submit(lambda: open_receive_channel(ticket, CPU, 1).close())
        ranks = TrainerRanks(TRAINER.world)
        with pytest.raises(TransferError, match="the weight update broke between the trainer and the servers"):
            for _ in range(3):
                ranks.send(ticket, shards)


@pytest.mark.parametrize("way", ["hand-over"], indirect=True)
@pytest.mark.parametrize("updates", [0, 1], ids=["before the first", "after one"])
def test_a_lost_worker_takes_nothing_from_the_others(way: str, updates: int, make_ticket: Any) -> None:
    ticket = make_ticket([ServerLayout(1), ServerLayout(1)])
    shards = cut_shards(ARCH, TRAINER, make_tensors())
    with ThreadPoolExecutor(2) as pool:
        stays = pool.submit(take, ticket, 0, ServerLayout(1), 0, 3)
        pool.submit(take, ticket, 1, ServerLayout(1), 0, updates)
        ranks = TrainerRanks(TRAINER.world)
        sums = [ranks.send(ticket, shards) for _ in range(3)]
        assert [checksum for _, checksum in stays.result(30)] == [both[0] for both in sums]


@pytest.mark.parametrize("way", ["hand-over"], indirect=True)
def test_a_stranger_gets_no_weights(way: str, make_ticket: Any) -> None:
    ticket = make_ticket([ServerLayout(1)], trainer=Layout(1))
    with ThreadPoolExecutor(1) as pool:
        channel = pool.submit(open_send_channel, ticket, CPU, 0)
        port = int(open_store(ticket).get("worker-0"))
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b'{"key": "guessed", "worker": 0}\n')
            assert stranger.recv(100) == b""
        open_receive_channel(ticket, CPU, 0).close()
        channel.result(30).close()


class Controller:
    """Gives out one ticket after another."""

    def __init__(self, *tickets: UpdateTicket) -> None:
        self.tickets, self.requests = list(tickets), list[UpdateRequest]()

    def begin_update(self, request: UpdateRequest) -> UpdateTicket:
        self.requests.append(request)
        return self.tickets.pop(0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """torch.distributed's own world, of this process only."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["one group"], indirect=True)
def test_a_server_lost_on_the_way_costs_another_attempt_without_it(way: str, alone: None, make_ticket: Any) -> None:
    trainer, tensors = Layout(1), make_tensors()
    both, rest = (
        make_ticket(servers, trainer=trainer).model_copy(update={"group": f"try-{len(servers)}"})
        for servers in ([ServerLayout(1)] * 2, [ServerLayout(1)])
    )
    controller = Controller(both, rest)
    with ThreadPoolExecutor(3) as pool:
        stays = pool.submit(take, both, 0, ServerLayout(1), 0, 1)
        pool.submit(lambda: open_receive_channel(both, CPU, 1).close())
        again = pool.submit(take, rest, 0, ServerLayout(1), 0, 1)
        shard = cut_shards(ARCH, trainer, tensors)[0]
        sums = WeightSender(CPU, shares=True).update(controller, 7, ARCH, trainer, shard)  # type: ignore[arg-type]
        assert isinstance(stays.exception(30), RuntimeError)
        assert [again.result(30)[0][1]] == sums
    assert [(it.version, it.terms) for it in controller.requests] == [(7, both.terms)] * 2


def test_a_fault_of_the_trainer_itself_is_not_tried_for_ever(alone: None, make_ticket: Any) -> None:
    trainer = Layout(1)
    ticket = make_ticket([ServerLayout(1)], trainer=trainer)
    controller = Controller(*(ticket.model_copy(update={"group": f"try-{n}"}) for n in range(9)))
    shard = cut_shards(ARCH, trainer, make_tensors())[0]
    del shard["decoder.layers.3.mlp.router.weight"]
    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(take, controller.tickets[n], 0, ServerLayout(1), 0, 1) for n in range(ATTEMPTS)]
        with pytest.raises(TransferError, match=r"the trainer has no parameter decoder\.layers\.3\.mlp\.router"):
            WeightSender(CPU, shares=True).update(controller, 7, ARCH, trainer, shard)  # type: ignore[arg-type]
        assert all(isinstance(worker.exception(30), RuntimeError) for worker in workers)
    assert len(controller.requests) == ATTEMPTS
