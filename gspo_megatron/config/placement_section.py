"""The machines of a run: their kind and number, and the share that the run may use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section

GpuKind = Literal["a100", "h20", "h800", "h100", "h200", "b200", "b300", "gb200", "cpu"]


class DeviceSection(Section):
    """`placement.device`: a GPU that `placement.gpu` does not name, from its data sheet."""

    memory: float = Field(gt=0, le=100_000)
    """Memory that a process sees, GiB."""
    flops: float = Field(gt=0, le=1e6)
    """Peak of dense products in bfloat16, TFLOP/s."""
    memory_bandwidth: float = Field(gt=0, le=1e6)
    """Memory bandwidth, GB/s."""
    link: float = Field(gt=0, le=1e6)
    """Bandwidth one way between two GPUs of a node, GB/s."""
    network: float = Field(gt=0, le=1e6)
    """Bandwidth one way of a GPU's share of the node's network, GB/s."""
    per_node: int = Field(default=8, gt=0, le=1024)
    """GPUs of a node. Source: usual servers."""


class PlacementSection(Section):
    """`placement`: the machines of the run, read by `gspo plan` and by the launcher."""

    gpu: GpuKind | None = None
    """Kind of every GPU; `cpu` = gloo ranks without a GPU; null = detected on this machine, or `device`."""
    device: DeviceSection | None = None
    """Data of a GPU that `gpu` has no name for; null = `gpu` names it."""
    nodes: int = Field(default=1, gt=0, le=10_000)
    """Nodes of the job, rollout nodes included."""
    gpus_per_node: int | None = Field(default=None, gt=0, le=1024)
    """GPUs per node, or trainer ranks per node without a GPU; null = 8 GPUs (gb200: 4), or 2 ranks."""
    rollout_nodes: int = Field(default=0, ge=0)
    """Nodes that only run vLLM servers; 0 = colocated: servers share the trainer's GPUs and sleep while it trains."""
    server_nodes: int | None = Field(default=None, gt=0)
    """Nodes that one server spans; null = the fewest that hold its GPUs (1 without GPUs)."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Host memory per node, GiB; null = 1,500 (the least of usual 8-GPU servers), or this machine's without a GPU."""
    walltime_hours: float | None = Field(default=None, gt=0)
    """Time limit of one job, hours; a longer run is requeued and resumes. null = no limit."""
    disk_gib: float | None = Field(default=None, gt=0)
    """Space that the run directory may fill, GiB; null = not checked."""

    price: float | None = Field(default=None, gt=0)
    """Price of a GPU-hour, in any currency; `gspo plan` then shows that of the run. null = not shown."""
    power: float | None = Field(default=None, gt=0, le=100_000)
    """Watts of a GPU with its share of the node and of the cooling; `gspo plan` then shows the run's energy. null = not
    shown."""

    @model_validator(mode="after")
    def one_kind_of_gpu(self) -> PlacementSection:
        if self.gpu is not None and self.device is not None:
            raise ValueError(f"gpu={self.gpu} and device both describe the GPU; remove one")
        return self
