"""The machines a run is planned for: what a device holds and how fast it is, with the source of each number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.cluster.visible_devices import list_gpus
from gspo_megatron.config.placement_section import GpuKind
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or a CPU rank."""

    kind: GpuKind
    """`h100`."""
    memory: int
    """Bytes a process sees as total (torch.cuda.mem_get_info); of a CPU machine, bytes that all processes share."""
    matmul: float
    """Peak dense bfloat16 FLOP/s, from the data sheet."""
    bandwidth: float
    """Memory bytes/s, from the data sheet."""
    node_link: float
    """Bytes/s one way between two devices of a node."""
    network: float
    """Bytes/s one way of a device's share of the node's network: one 400 Gb/s port a GPU."""


DEVICES: dict[GpuKind, Device] = {
    "h100": Device("h100", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device("h200", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 50e9),
    "b200": Device("b200", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, 50e9),
    # One core: what gloo ranks of the tiny recipe were seen to do, within a factor of two.
    "cpu": Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 2e10, 1e10, 1e9, 1e8),
}
HOST_MEMORY = 1500 * GIB
"""Bytes of a GPU node when the recipe does not say."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machines of one run."""

    device: Device
    """The kind of every GPU."""
    nodes: int
    """Nodes of the job."""
    per_node: int
    """GPUs of a node, or CPU ranks."""
    rollout_nodes: int
    """Nodes that only run servers."""
    ranks: int
    """Trainer ranks."""
    host_memory: int
    """Bytes of one node."""

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.device.kind == "cpu"

    @property
    def colocated(self) -> bool:
        """Whether servers share the trainer's GPUs."""
        return self.rollout_nodes == 0 and not self.is_cpu

    @property
    def trainer_devices(self) -> int:
        """GPUs, or CPU ranks, of the trainer nodes."""
        return (self.nodes - self.rollout_nodes) * self.per_node

    @property
    def rollout_devices(self) -> int:
        """GPUs that servers may use."""
        return (self.rollout_nodes or self.nodes) * self.per_node

    @property
    def devices(self) -> int:
        """GPUs of the job."""
        return self.nodes * self.per_node


def machine_of(recipe: Recipe, ranks: int | None = None) -> Machine:
    """The machines of a recipe's `placement`, or this one machine when trainer ranks are given."""
    placement = recipe.placement
    kind, here = (placement.gpu, None) if placement.gpu else find_gpus()
    nodes, rollout_nodes = (1, 0) if ranks else (placement.nodes, placement.rollout_nodes)
    per_node = ranks or placement.gpus_per_node or here or (2 if kind == "cpu" else 8)
    if kind == "cpu" and not placement.gpus_per_node and recipe.trainer.ranks:
        per_node = -(-recipe.trainer.ranks // max(1, nodes - rollout_nodes))
    device = DEVICES[kind]
    if placement.host_memory_gib is not None:
        host = int(placement.host_memory_gib * GIB)
    else:
        host = device.memory if kind == "cpu" else HOST_MEMORY
    trainer_devices = max(0, nodes - rollout_nodes) * per_node
    return Machine(device, nodes, per_node, rollout_nodes, ranks or recipe.trainer.ranks or trainer_devices, host)


def takes_turns(recipe: Recipe) -> bool:
    """Whether servers sleep while the trainer works, and the trainer's memory is on the host while they sample.

    Always where they share GPUs. Where there is no GPU nothing is gained by it, but a synchronous run goes the same
    way; with `rollout.max_staleness` the servers sample on instead.
    """
    machine = machine_of(recipe)
    return machine.colocated or (machine.is_cpu and not machine.rollout_nodes and not recipe.rollout.max_staleness)


def find_gpus() -> tuple[GpuKind, int | None]:
    """Kind and number of the GPUs that this process may use; an unknown kind is planned as an H100."""
    names = [gpu.model.lower() for gpu in list_gpus()]
    if not names:
        return "cpu", None
    kinds: tuple[GpuKind, ...] = ("h200", "b200", "h100")
    found: GpuKind = "h100"
    for kind in kinds:
        if kind in names[0]:
            found = kind
            break
    return found, len(names)


def count_gpus() -> int:
    """GPUs of this machine that this process may use, without importing torch."""
    return find_gpus()[1] or 0


def findings(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Nodes and GPUs that do not add up."""
    if machine.rollout_nodes >= machine.nodes:
        yield Finding(
            "no-trainer-nodes", "error", "placement.rollout_nodes",
            f"{machine.rollout_nodes} of {machine.nodes} nodes run servers: none is left to train",
            f"set placement.rollout_nodes below {machine.nodes}, or 0 to share the GPUs",
        )  # fmt: skip
        return
    ranks, there = machine.ranks, machine.trainer_devices
    if machine.is_cpu or ranks == there:
        return
    where = f"the {machine.nodes - machine.rollout_nodes} trainer node(s) have {there} GPUs"
    if ranks > there:
        yield Finding(
            "more-ranks-than-gpus", "error", "trainer.ranks", f"{ranks} trainer ranks, but {where}",
            "set trainer.ranks=null (one rank a GPU) or take more nodes",
        )  # fmt: skip
    else:
        yield Finding(
            "idle-gpus", "warning", "trainer.ranks", f"{ranks} trainer ranks, but {where}: {there - ranks} idle",
            "set trainer.ranks=null (one rank a GPU) or take fewer nodes",
        )  # fmt: skip
