"""Where a run happens: kind and number of machines, and what of them the run may use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gspo_megatron.config.base import Section

GpuKind = Literal["h100", "h200", "b200", "cpu"]


class PlacementSection(Section):
    """`placement`: the machines of the run, for `gspo plan` and the launcher."""

    gpu: GpuKind | None = None
    """Kind of every GPU; `cpu` = gloo ranks; null = what this machine has."""
    nodes: int = Field(default=1, gt=0, le=10_000)
    """Nodes of the whole job, rollout nodes included."""
    gpus_per_node: int | None = Field(default=None, gt=0, le=1024)
    """GPUs of one node, or trainer ranks of one where there is none; null = 8, or 2 ranks."""
    rollout_nodes: int = Field(default=0, ge=0)
    """Nodes that only run servers; 0 = colocated: servers share the trainer's GPUs and sleep while it trains."""
    server_nodes: int | None = Field(default=None, gt=0)
    """Nodes that one server spans; null = as few as have its GPUs (1 where there are none)."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one node, GiB; null = 1,500, what 8-GPU servers have at least, or this machine's."""
    walltime_hours: float | None = Field(default=None, gt=0)
    """Time limit of one job, hours; a longer run is requeued and resumes. null = none."""
    disk_gib: float | None = Field(default=None, gt=0)
    """Space that the run directory may fill, GiB; null = not checked."""
