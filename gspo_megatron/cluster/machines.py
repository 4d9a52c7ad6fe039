"""The machines a run is planned for: what a device holds and how fast it is, with the source of each number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.cluster.visible_devices import list_gpus
from gspo_megatron.config.placement_section import GpuKind, PlacementSection
from gspo_megatron.config.refusal import refuse
from gspo_megatron.config.schema import Recipe
from gspo_megatron.types import Finding

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or a CPU rank."""

    kind: str
    """A name of `placement.gpu`; `gpu` = described by `placement.device`."""
    memory: int
    """Bytes a process sees as total (torch.cuda.mem_get_info); of a CPU machine, bytes that all processes share."""
    matmul: float
    """Peak dense bfloat16 FLOP/s, from the data sheet."""
    bandwidth: float
    """Memory bytes/s, from the data sheet."""
    node_link: float
    """Bytes/s one way between two devices of a node."""
    network: float
    """Bytes/s one way of a device's share of the node's network."""
    per_node: int = 8
    """GPUs of a usual node."""
    domain: int = 0
    """GPUs that `node_link` connects across nodes; 0 = those of a node."""


DEVICES: dict[GpuKind, Device] = {
    "a100": Device("a100", int(79.2 * GIB), 312e12, 2.04e12, 300e9, 25e9),
    "h20": Device("h20", int(95.1 * GIB), 148e12, 4.0e12, 450e9, 50e9),
    "h800": Device("h800", int(79.1 * GIB), 989e12, 3.35e12, 200e9, 50e9),
    "h100": Device("h100", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device("h200", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 50e9),
    "b200": Device("b200", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, 50e9),
    "b300": Device("b300", int(267.7 * GIB), 2250e12, 8.0e12, 900e9, 100e9),
    # 72 GPUs of 18 nodes share NVLink. Groups of powers of two use 64 of them.
    "gb200": Device("gb200", int(184.0 * GIB), 2500e12, 8.0e12, 900e9, 50e9, per_node=4, domain=64),
    # One core: what gloo ranks of the tiny recipe were seen to do, within a factor of two.
    "cpu": Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 2e10, 1e10, 1e9, 1e8, per_node=2),
}
"""Rates one way, from data sheets; the network is one port a GPU: 200 Gb/s (a100), 400, or 800 (b300)."""
NOMINAL_GB = {"a100": 80, "h20": 96, "h800": 80, "h100": 80, "h200": 141, "b200": 180, "b300": 288, "gb200": 186}
"""Memory that is sold under each name. A name with another size is another GPU."""
HOPPER, BLACKWELL = ("h20", "h800", "h100", "h200"), ("b200", "b300", "gb200")
"""GPUs of a generation."""
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
    def domain(self) -> int:
        """GPUs that reach each other at the speed of `device.node_link`."""
        return max(self.per_node, self.device.domain)

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
    """The machines of a recipe's `placement`, or this one machine when trainer ranks are given.

    Raises:
        RecipeError: the recipe names no GPU, and the one of this machine is unknown.
    """
    placement = recipe.placement
    device, here = _device(placement)
    is_cpu = device.kind == "cpu"
    nodes, rollout_nodes = (1, 0) if ranks else (placement.nodes, placement.rollout_nodes)
    per_node = ranks or placement.gpus_per_node or here or device.per_node
    if is_cpu and not placement.gpus_per_node and recipe.trainer.ranks:
        per_node = -(-recipe.trainer.ranks // max(1, nodes - rollout_nodes))
    if placement.host_memory_gib is not None:
        host = int(placement.host_memory_gib * GIB)
    else:
        host = device.memory if is_cpu else HOST_MEMORY
    trainer_devices = max(0, nodes - rollout_nodes) * per_node
    return Machine(device, nodes, per_node, rollout_nodes, ranks or recipe.trainer.ranks or trainer_devices, host)


def _device(placement: PlacementSection) -> tuple[Device, int | None]:
    """The device of a placement, and the number of GPUs of this machine if it was looked at."""
    if placement.device is not None:
        data = placement.device
        memory = int(data.memory * GIB)
        rates = (data.flops * 1e12, data.memory_bandwidth * 1e9, data.link * 1e9, data.network * 1e9)
        return Device("gpu", memory, *rates, per_node=data.per_node), None
    if placement.gpu is not None:
        return DEVICES[placement.gpu], None
    kind, here = find_gpus()
    if kind is None:
        raise refuse(
            "unknown-gpu", "placement.gpu",
            f"null, and nothing is known of this machine's {list_gpus()[0].model or 'part of a GPU'}",
            f"set it to one of {', '.join(DEVICES)} that is close, or describe the GPU in placement.device",
        )  # fmt: skip
    return DEVICES[kind], here


def takes_turns(recipe: Recipe) -> bool:
    """Whether servers sleep while the trainer works, and the trainer's memory is on the host while they sample.

    Always where they share GPUs. Where there is no GPU nothing is gained by it, but a synchronous run goes the same
    way; with `rollout.max_staleness` the servers sample on instead.
    """
    machine = machine_of(recipe)
    return machine.colocated or (machine.is_cpu and not machine.rollout_nodes and not recipe.rollout.max_staleness)


def find_gpus() -> tuple[GpuKind | None, int | None]:
    """Kind and number of the GPUs that this process may use; None = an unknown kind."""
    gpus = list_gpus()
    return (_kind_of(gpus[0].model), len(gpus)) if gpus else ("cpu", None)


def _kind_of(model: str) -> GpuKind | None:
    """The kind that nvidia-smi's name of a GPU names: `NVIDIA H100 80GB HBM3`, `NVIDIA A100-SXM4-80GB`."""
    words = re.findall("[a-z0-9]+", model.lower())
    kind: GpuKind | None = next((kind for kind in DEVICES if kind in words), None)
    sizes = [int(word[:-2]) for word in words if re.fullmatch("[0-9]+gb", word)]
    # Cards for PCIe have fewer units and no NVLink under the same name.
    if kind is None or "pcie" in words or any(abs(size / NOMINAL_GB[kind] - 1) > 0.2 for size in sizes):
        return None
    return kind


def count_gpus() -> int:
    """GPUs of this machine that this process may use, without importing torch."""
    return len(list_gpus())


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
