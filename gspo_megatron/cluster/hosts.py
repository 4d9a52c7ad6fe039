"""Which role runs on which host and port, with which command: one table for one machine and for a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gspo_megatron.cluster.gpu_environment import trainer_variables
from gspo_megatron.cluster.machines import machine_of
from gspo_megatron.cluster.placement import SERVERS_PER_HOST, server_gpus, server_nodes
from gspo_megatron.config.schema import Recipe

Kind = Literal["rollout", "controller", "trainer", "evaluator"]
CPU_RANKS = 2
"""Trainer ranks of a node without GPUs, unless `trainer.ranks` says otherwise."""
LOADED = "--loaded"
"""Argument of servers and controller: the weights are those in the run directory, and no update will come."""
SERVER_RESTARTS = 3
"""Times that each of several servers may be lost in one attempt; a single server takes the attempt with it."""
PORT_STRIDE = SERVERS_PER_HOST + 2
"""Ports of one job: rendezvous, controller, and the servers of one host."""
FIRST_PORT, PORT_JOBS = 20000, 750
"""Ports lie in 20000-31999: below what Linux hands out to outgoing connections (32768 and up)."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of the run."""

    name: str
    """As SLURM calls it: `node017`."""
    address: str
    """How the others reach it: an IP address once it is known, its name before."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the roles listen."""

    rendezvous: int
    """The trainer ranks' meeting point, on the first trainer host."""
    controller: int
    """The controller, on the first trainer host."""
    servers: tuple[int, ...]
    """One for each server of a host, the same on every host."""

    @classmethod
    def of_job(cls, job: int) -> Ports:
        """The ports of a SLURM job; those of jobs that run at the same time are distinct."""
        first = FIRST_PORT + PORT_STRIDE * (job % PORT_JOBS)
        return cls(first, first + 1, tuple(range(first + 2, first + PORT_STRIDE)))


@dataclass(frozen=True, slots=True)
class Task:
    """One process of the run."""

    kind: Kind
    index: int
    """Rank, or number of the server."""
    host: Host
    local: int
    """Which of this kind it is on its host."""
    arguments: tuple[str, ...]
    """What follows `python`; never a secret."""
    environment: dict[str, str]
    """Added to the environment. `CUDA_VISIBLE_DEVICES` holds places among the GPUs that its host shows."""
    ports: tuple[int, ...]
    """Ports of its host on which it listens."""
    part: int = 0
    """Which node's part of a server that spans nodes; the first answers requests."""
    restarts: int = 0
    """Times it is started again when it is lost while others of its kind run."""

    @property
    def name(self) -> str:
        """`trainer-0`, `rollout-1`, `controller`; `rollout-1.1` is the second node's part of a server."""
        if self.kind in ("controller", "evaluator"):
            return self.kind
        return f"{self.kind}-{self.index}" + (f".{self.part}" if self.part else "")


@dataclass(frozen=True, slots=True)
class Spread:
    """How many of everything each host holds."""

    trainers: tuple[Host, ...]
    """Hosts with trainer ranks; the controller is on the first."""
    ranks: int
    """Trainer ranks of each."""
    servers: tuple[Host, ...]
    """Hosts with servers: the same ones when colocated."""
    servers_each: int
    """Servers of each."""
    gpus: int
    """GPUs of a host; 0 = none."""
    server_nodes: int = 1
    """Hosts that one server spans; then it has them for itself."""

    @property
    def world(self) -> int:
        """Trainer ranks of the run."""
        return self.ranks * len(self.trainers)

    @property
    def colocated(self) -> bool:
        """Whether servers and trainer share hosts."""
        return self.servers[0] in self.trainers

    def server_places(self) -> list[tuple[tuple[Host, ...], int]]:
        """Of each server: the hosts that it spans, and which one it is on them."""
        span = self.server_nodes
        groups = [self.servers[first : first + span] for first in range(0, len(self.servers), span)]
        return [(group, local) for group in groups for local in range(self.servers_each)]

    def of(self, kind: Kind) -> tuple[tuple[Host, ...], int]:
        """Hosts of a kind of role and how many of it each has."""
        if kind == "rollout":
            return self.servers, self.servers_each
        return (self.trainers, self.ranks) if kind == "trainer" else (self.trainers[:1], 1)


def spread(recipe: Recipe, hosts: Sequence[Host], gpus: int) -> Spread:
    """Trainer hosts first, rollout hosts after them. Only for a recipe without `fit.findings`."""
    apart = recipe.placement.rollout_nodes
    trainers, servers = tuple(hosts[: len(hosts) - apart]), tuple(hosts[len(hosts) - apart :])
    ranks = (recipe.trainer.ranks or 0) // len(trainers) or gpus or CPU_RANKS
    span = server_nodes(recipe, gpus)
    where = (servers if apart else trainers)[: recipe.rollout.servers * span]
    return Spread(trainers, ranks, where, recipe.rollout.servers * span // len(where), gpus, span)


def tasks(recipe: Recipe, over: Spread, ports: Ports, run_dir: Path) -> list[Task]:
    """Every process of the run, servers first: they take longest to start."""
    where = ("--run-dir", str(run_dir))
    places = over.server_places()
    # A server cannot start on a GPU that the trainer is using, nor a part without the other parts of its server.
    lone = len(places) == 1 or over.server_nodes > 1 or machine_of(recipe).colocated
    restarts = 0 if lone else SERVER_RESTARTS
    return [
        *(
            replace(_server(recipe, over, ports, where, index, part, *place), restarts=restarts)
            for index, place in enumerate(places)
            for part in range(over.server_nodes)
        ),
        _controller(over, ports, where),
        *(
            _trainer(recipe, over, ports, where, host, number * over.ranks + local, local)
            for number, host in enumerate(over.trainers)
            for local in range(over.ranks)
        ),
    ]


def evaluation_tasks(recipe: Recipe, over: Spread, ports: Ports, run_dir: Path) -> list[Task]:
    """Every process of an evaluation: servers that hold their weights from the start, and no trainer."""
    where = ("--run-dir", str(run_dir))
    url = f"http://{over.trainers[0].address}:{ports.controller}"
    evaluator = ("-m", "gspo_megatron.evaluation.evaluator", *where, "--controller", url)
    serving = [
        _server(recipe, over, ports, where, index, 0, *place) for index, place in enumerate(over.server_places())
    ]
    return [
        *(replace(task, arguments=(*task.arguments, LOADED)) for task in (*serving, _controller(over, ports, where))),
        Task("evaluator", 0, over.trainers[0], 0, evaluator, {}, ()),
    ]


def _controller(over: Spread, ports: Ports, where: tuple[str, ...]) -> Task:
    first = over.trainers[0]
    urls = ",".join(f"http://{group[0].address}:{ports.servers[local]}" for group, local in over.server_places())
    listen = ("--host", first.address, "--port", str(ports.controller))
    arguments = ("-m", "gspo_megatron.controller.main", *where, *listen, "--servers", urls)
    return Task("controller", 0, first, 0, arguments, {}, (ports.controller,))


def _server(
    recipe: Recipe, over: Spread, ports: Ports, where: tuple[str, ...], index: int, part: int,
    group: Sequence[Host], local: int,
) -> Task:  # fmt: skip
    """One part of a server: all of it, unless it spans nodes."""
    size, host, port = server_gpus(recipe) // over.server_nodes, group[part], ports.servers[local]
    devices = ",".join(str(device) for device in range(local * size, (local + 1) * size))
    arguments = ["--index", str(index), "--host", host.address, "--port", str(port)]
    listens = [] if part else [port]
    if over.server_nodes > 1:
        # It has its nodes for itself, so the next server's port is free on them.
        meeting = ports.servers[local + 1]
        arguments += ["--part", str(part), "--of", str(over.server_nodes), "--meet", f"{group[0].address}:{meeting}"]
        listens += [] if part else [meeting]
    environment = {"CUDA_VISIBLE_DEVICES": devices} if over.gpus else {}
    command = ("-m", "gspo_megatron.inference.server", *where, *arguments)
    return Task("rollout", index, host, local, command, environment, tuple(listens), part)


def _trainer(
    recipe: Recipe, over: Spread, ports: Ports, where: tuple[str, ...], host: Host, rank: int, local: int
) -> Task:
    meeting = over.trainers[0].address
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(over.world),
        "MASTER_ADDR": meeting,
        "MASTER_PORT": str(ports.rendezvous),
        "OMP_NUM_THREADS": "1",
        **(trainer_variables(recipe) if over.gpus else {}),
    }
    controller = f"http://{meeting}:{ports.controller}"
    arguments = ("-m", "gspo_megatron.trainer.loop", *where, "--controller", controller)
    return Task("trainer", rank, host, local, arguments, environment, (ports.rendezvous,) if rank == 0 else ())
