"""The machines of a run: their kind and number, and the share that the run may use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section

GpuKind = Literal["h100", "h200", "b200", "cpu"]


class PlacementSection(Section):
    """`placement`: the machines of the run, read by `gspo plan` and by the launcher."""

    gpu: GpuKind | None = None
    """Kind of every GPU; `cpu` = gloo ranks without a GPU; null = detected on this machine."""
    nodes: int = Field(default=1, gt=0, le=10_000)
    """Nodes of the job, rollout nodes included."""
    gpus_per_node: int | None = Field(default=None, gt=0, le=1024)
    """GPUs per node, or trainer ranks per node without a GPU; null = 8 GPUs, or 2 ranks."""
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
