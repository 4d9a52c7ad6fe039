"""The wire: checksums that see what matters and nothing else, and real gloo groups of threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from gspo_megatron.config.model import Architecture
from gspo_megatron.rollout import checksum as checksums
from gspo_megatron.rollout.checksum import Checksum, add_parameter, plane
from gspo_megatron.rollout.sender import ATTEMPTS, WeightSender
from gspo_megatron.rollout.transfer import Ticket, TransferError, TransferGroup, receive
from gspo_megatron.weights.layout import Layout
from gspo_megatron.weights.server_layout import ServerLayout, server_parameters
from gspo_megatron.weights.table import hf_shapes
from gspo_megatron.weights.transfer_plan import Slice
from tests.shards import CPU, TrainerRanks, cut_shards

ARCH = Architecture(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
TRAINER = Layout(4, tensor=2, pipeline=2, expert=2)
SERVERS = [ServerLayout(2), ServerLayout(1, 2), ServerLayout(1)]


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(ARCH).items()}


GATE = "model.layers.1.mlp.gate.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def rectangle_of(name: str, value: torch.Tensor, rows: slice, columns: slice) -> tuple[Slice, torch.Tensor]:
    matrix = value if value.dim() > 1 else value[:, None]
    part = matrix[rows, columns]
    return Slice(name, rows.start, columns.start, *part.shape, parameter=name, at=(0, rows.start, columns.start)), part


def whole(name: str, value: torch.Tensor) -> list[tuple[Slice, torch.Tensor]]:
    return [rectangle_of(name, value, slice(0, len(value)), slice(0, value.shape[-1] if value.dim() > 1 else 1))]


def tiles(name: str, value: torch.Tensor, height: int, width: int) -> list[tuple[Slice, torch.Tensor]]:
    edges = product(range(0, len(value), height), range(0, value.shape[1] if value.dim() > 1 else 1, width))
    return [rectangle_of(name, value, slice(row, row + height), slice(column, column + width)) for row, column in edges]


def checksum_of(parts: list[tuple[Slice, torch.Tensor]], dtype: torch.dtype = torch.float32) -> int:
    checksum = Checksum(ARCH, dtype, CPU)
    for part, values in parts:
        checksum.add(0, [part], values[None])
    return checksum.values()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_in_any_order_sum_up_to_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(dtype)
    names = [GATE, O_PROJ, NORM]
    value = checksum_of([part for name in names for part in whole(name, tensors[name])], dtype)
    parts = [part for name in names for part in tiles(name, tensors[name], 4, 32)]
    random.Random(0).shuffle(parts)
    assert checksum_of(parts, dtype) == value
    monkeypatch.setattr(checksums, "CHUNK", 70)
    assert checksum_of(parts, dtype) == value


@pytest.mark.parametrize("chunk", [1 << 22, 5000, 100])
def test_slices_of_one_shape_count_together_as_they_count_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "CHUNK", chunk)
    for parameter in server_parameters(ARCH, ServerLayout(2), 1):
        values = torch.randn(parameter.shape)
        together, alone = Checksum(ARCH, torch.float32, CPU), Checksum(ARCH, torch.float32, CPU)
        add_parameter(together, parameter, values)
        for piece in parameter.pieces:
            alone.add(0, [piece], plane(values, piece)[None])
        assert together.values() == alone.values() != [0]


def test_the_checksum_of_one_matrix_by_hand() -> None:
    part = Slice(O_PROJ, 2, 3, 1, 2, O_PROJ, (0, 2, 3))  # positions 2 * 128 + 3 and one on
    values = torch.tensor([[5, 7]], dtype=torch.int32).view(torch.float32)
    expected = (6 * (2 * 259 + 1) + 8 * (2 * 260 + 1)) * checksums.label(O_PROJ, "torch.float32", (64, 128))
    assert checksum_of([(part, values)]) == expected % 2**64


def test_everything_else_matters() -> None:
    tensors = make_tensors()
    first, second = tensors[O_PROJ], tensors[GATE]
    rest = whole(GATE, second)
    changed, swapped, zeros = first.clone(), first.clone(), torch.zeros_like(first)
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(100.0))
    swapped[0, 0], swapped[2, 3] = first[2, 3], first[0, 0]
    other_name = O_PROJ.replace("layers.1", "layers.2")
    variants = [
        whole(O_PROJ, first) + rest,
        whole(O_PROJ, changed) + rest,
        whole(O_PROJ, swapped) + rest,
        whole(O_PROJ, zeros) + rest,
        rest,
        whole(O_PROJ, first),
        whole(other_name, first) + rest,
        whole(O_PROJ, first) + rest + rest,
        whole(O_PROJ, -first) + rest,
        [*tiles(O_PROJ, first, 32, 128)[:1], (tiles(O_PROJ, first, 32, 128)[1][0], first[:32]), *rest],
        whole(O_PROJ, first.flip(0)) + rest,
    ]
    values = [checksum_of(parts) for parts in variants]
    assert len(set(values)) == len(values)


@pytest.fixture
def make_ticket() -> Iterator[Any]:
    stores = []

    def make(servers: list[ServerLayout] = SERVERS, dtype: str = "float32") -> dict[str, Any]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
        stores.append(store)
        layouts = [asdict(server) for server in servers]
        ticket = Ticket("127.0.0.1", store.port, "test", 1, 20.0, ARCH.model_dump(), dtype, asdict(TRAINER), layouts)
        return asdict(ticket)

    yield make


def owners(servers: list[ServerLayout]) -> list[tuple[ServerLayout, int]]:
    return [(server, rank) for server in servers for rank in range(server.world)]


def take(ticket: dict[str, Any], worker: int, server: ServerLayout, rank: int, rounds: int) -> list[Any]:
    """What one worker gets in so many updates: (parameters by name, checksum)."""
    group = TransferGroup(Ticket(**ticket), CPU, worker=worker)
    found = []
    try:
        for _ in range(rounds):
            checksum, held = Checksum(ARCH, group.dtype, CPU), {}
            for parameter, values in receive(group, server_parameters(ARCH, server, rank)):
                held[parameter.name] = values
                for piece in parameter.pieces:
                    checksum.add(0, [piece], plane(values, piece)[None])
            found.append((held, checksum.values()[0]))
    finally:
        group.close()
    return found


def start_workers(pool: ThreadPoolExecutor, ticket: dict[str, Any], rounds: int) -> list[Future[list[Any]]]:
    servers = [ServerLayout(**server) for server in ticket["servers"]]
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


def test_a_lost_worker_is_a_sentence(make_ticket: Any) -> None:
    ticket = make_ticket([ServerLayout(1), ServerLayout(1)])
    shards = cut_shards(ARCH, TRAINER, make_tensors())
    with ThreadPoolExecutor(2) as pool:
        pool.submit(take, ticket, 0, ServerLayout(1), 0, 9)
        pool.submit(lambda: TransferGroup(Ticket(**ticket), CPU, worker=1).close())
        ranks = TrainerRanks(TRAINER.world)
        with pytest.raises(TransferError, match="the weight update broke between the trainer and the servers"):
            for _ in range(3):
                ranks.send(ticket, shards)


class Controller:
    """Gives out one ticket after another."""

    def __init__(self, *tickets: dict[str, Any]) -> None:
        self.tickets, self.begun = list(tickets), []

    def begin_update(self, version: int, arch: Architecture, dtype: str, layout: Layout) -> dict[str, Any]:
        self.begun.append((version, arch, dtype, layout))
        return self.tickets.pop(0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """torch.distributed's own world, of this process only."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_server_lost_on_the_way_costs_another_attempt_without_it(alone: None, make_ticket: Any) -> None:
    trainer, tensors = Layout(1), make_tensors()
    both, rest = (
        make_ticket(servers) | {"trainer": asdict(trainer), "group": f"try-{len(servers)}"}
        for servers in ([ServerLayout(1)] * 2, [ServerLayout(1)])
    )
    controller = Controller(both, rest)
    with ThreadPoolExecutor(3) as pool:
        stays = pool.submit(take, both, 0, ServerLayout(1), 0, 1)
        pool.submit(lambda: TransferGroup(Ticket(**both), CPU, worker=1).close())
        again = pool.submit(take, rest, 0, ServerLayout(1), 0, 1)
        shard = cut_shards(ARCH, trainer, tensors)[0]
        sums = WeightSender(CPU).update(controller, 7, ARCH, trainer, shard)  # type: ignore[arg-type]
        assert isinstance(stays.exception(30), RuntimeError)
        assert [again.result(30)[0][1]] == sums
    assert controller.begun == [(7, ARCH, "float32", trainer)] * 2


def test_a_fault_of_the_trainer_itself_is_not_tried_for_ever(alone: None, make_ticket: Any) -> None:
    trainer = Layout(1)
    ticket = make_ticket([ServerLayout(1)]) | {"trainer": asdict(trainer)}
    controller = Controller(*(ticket | {"group": f"try-{n}"} for n in range(9)))
    shard = cut_shards(ARCH, trainer, make_tensors())[0]
    del shard["decoder.layers.3.mlp.router.weight"]
    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(take, controller.tickets[n], 0, ServerLayout(1), 0, 1) for n in range(ATTEMPTS)]
        with pytest.raises(TransferError, match=r"the trainer has no parameter decoder\.layers\.3\.mlp\.router"):
            WeightSender(CPU).update(controller, 7, ARCH, trainer, shard)  # type: ignore[arg-type]
        assert all(isinstance(worker.exception(30), RuntimeError) for worker in workers)
    assert len(controller.begun) == ATTEMPTS
