"""Memory of a trainer process: weights, gradients and optimizer are counted, everything else is estimated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import architecture_of
from gspo_megatron.models.hf_table import Parameter, trained_parameters
from gspo_megatron.parallel import Coordinates, Layout, round_up
from gspo_megatron.plan.estimate import activations, flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.types import ITEM_BYTES

GRADIENT_BYTES = 4
"""Bytes of a gradient: DDP's buffer is float32 for every type of weight."""
ADAM_BYTES = 8
"""Bytes of Adam's two float32 moments of a parameter."""
PROCESS_BYTES = {"one": 1_800_000_000, "many": 5_500_000_000, "cpu": 600_000_000}
"""`one`: CUDA context, libraries and one communicator. `many`: ten communicators. `cpu`: a torch process. Source: H100,
2026-11-26, `tools/results/h100_slice.json`: 0.65 GB of context, 0.57 of libraries, 0.59 for the first communicator and
0.41 for each more."""
SLEEPING_SERVER_BYTES = 3_000_000_000
"""Memory that a sleeping vLLM process keeps on a GPU: context, graphs, NCCL."""
ALLOCATOR_SHARE = 0.2
"""Slack of the caching allocator, as a share of the temporary memory. Source: H100, 2026-11-26, plan/NOTES.md: 0.2 to
0.44 of memory that itself is planned 13 to 22 % too high."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Memory of one rank of a pipeline stage during training. All ranks of the stage are equal up to rounding."""

    stage: int
    """Index of the stage, from 0."""
    layers: int
    """Layers of the stage."""
    dense_parameters: int
    """Parameters of the rank outside the experts."""
    expert_parameters: int
    """Parameters of the rank's experts."""
    exact: dict[str, int]
    """Bytes of weights, gradients and optimizer, counted from the weight table; dense and expert separately."""
    estimated: dict[str, int] = field(default_factory=dict)
    """Bytes of activations, head and process."""
    offloaded: int = 0
    """Bytes of activations in host memory."""

    @property
    def static_bytes(self) -> int:
        """Bytes in use between steps."""
        return sum(self.exact.values())

    @property
    def moved_bytes(self) -> int:
        """Bytes that move to the host while servers on the same GPUs sample. Gradients are freed instead."""
        return sum(size for name, size in self.exact.items() if "gradients" not in name)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment of a step."""
        return self.static_bytes + sum(self.estimated.values())

    @property
    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest term."""
        return max({**self.exact, **self.estimated}.items(), key=lambda item: item[1])


@dataclass(frozen=True, slots=True)
class Held:
    """Number of elements of each tensor of one model chunk on one rank, in the order of the model."""

    dense: tuple[int, ...]
    """Tensors outside the experts."""
    expert: tuple[int, ...]
    """Tensors of the rank's experts."""

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Held:
        """Read the sizes from a list of parameters."""
        return cls(
            tuple(math.prod(p.shape) for p in parameters if not p.expert),
            tuple(math.prod(p.shape) for p in parameters if p.expert),
        )


def held_by(arch: Architecture, layout: Layout, stage: int, critic: bool = False) -> tuple[Held, ...]:
    """Return what the first rank of a stage holds, one entry per model chunk; `critic`: with a value head."""
    # All layers are equal, and so are all middle stages: one entry of the cache serves them.
    stage = 1 if 0 < stage < layout.pipeline - 1 else stage
    return _held_by(flops.as_key(arch), replace(layout, world=0, context=1), stage, critic)  # pyright: ignore[reportArgumentType]  a frozen model is hashable


@lru_cache(maxsize=4096)
def _held_by(key: str, layout: Layout, stage: int, critic: bool) -> tuple[Held, ...]:
    arch = architecture_of(json.loads(key))
    at = Coordinates(tensor=0, context=0, data=0, pipeline=stage, expert_tensor=0, expert=0, expert_data=0)
    return tuple(Held.of(trained_parameters(arch, layout, at, chunk, critic)) for chunk in range(layout.virtual))


def exact_bytes(
    chunks: Sequence[Held], layout: Layout, element: int, distributed: bool, on_cpu: bool
) -> dict[str, int]:
    """Count bytes of weights, gradients and optimizer of one rank, dense and expert parameters separately.

    Args:
        chunks: what the rank holds. Each model chunk has its own buffers.
        element: bytes of a weight.
        distributed: whether megatron's distributed optimizer divides the states over the replicas.
        on_cpu: whether torch's Adam is used, which keeps a float32 step counter per tensor (fused ones keep one).
    """
    states = ADAM_BYTES + (0 if element == 4 else 4)  # a float32 model is its own main copy
    found: dict[str, int] = {}
    for kind, replicas, sizes in _buffers(chunks, layout):
        shards = replicas if distributed else 1
        elements = sum(_buffer_elements(chunk, shards) if distributed else sum(chunk) for chunk in sizes)
        found[f"{kind} weights".strip()] = elements * element
        found[f"{kind} gradients".strip()] = elements * GRADIENT_BYTES
        found[f"{kind} optimizer".strip()] = elements // shards * states + (4 * sum(map(len, sizes)) if on_cpu else 0)
    return found


def _buffers(chunks: Sequence[Held], layout: Layout) -> Iterator[tuple[str, int, list[tuple[int, ...]]]]:
    """Yield kind, number of replicas and tensor sizes per chunk of the buffers that megatron allocates.

    Experts have separate buffers unless they have the same replicas as the dense parameters. Then there is one kind
    with an empty name.
    """
    if not has_expert_buffers(layout):
        yield "", layout.data * layout.context, [chunk.dense + chunk.expert for chunk in chunks]
        return
    yield "dense", layout.data * layout.context, [chunk.dense for chunk in chunks]
    experts = [chunk.expert for chunk in chunks if chunk.expert]
    if experts:
        yield "expert", layout.expert_data, experts


def has_expert_buffers(layout: Layout) -> bool:
    """Return whether megatron keeps expert and dense parameters in separate buffers."""
    return layout.expert > 1 or layout.expert_tensor != layout.tensor


def _buffer_elements(sizes: Sequence[int], shards: int) -> int:
    """Count the elements of megatron's buffer.

    Parameters lie from last to first. Each starts at a multiple of 64, and the end is a multiple of lcm(shards, 128).
    """
    end = 0
    for size in reversed(sizes):
        end = round_up(end, 64) + size
    return round_up(end, math.lcm(shards, 128))


def stage_memory(recipe: Recipe, layout: Layout, batch: BatchPlan, machine: Machine) -> list[StageMemory]:
    """Estimate the memory of every pipeline stage."""
    arch = recipe.arch
    distributed = recipe.trainer.distributed_optimizer and not machine.is_cpu
    found = []
    for stage, layers in enumerate(layout.stage_sizes(arch.num_hidden_layers)):
        chunks = held_by(arch, layout, stage, recipe.objective.has_critic)
        shape = activations.Shape.of(recipe, arch, layout)
        offloads = recipe.trainer.offload_activations
        found.append(
            StageMemory(
                stage=stage,
                layers=layers,
                dense_parameters=sum(sum(chunk.dense) for chunk in chunks),
                expert_parameters=sum(sum(chunk.expert) for chunk in chunks),
                exact=exact_bytes(chunks, layout, ITEM_BYTES[recipe.model.dtype], distributed, machine.is_cpu),
                estimated=_estimate(recipe, arch, layout, batch, machine, stage, layers),
                offloaded=activations.offloaded_bytes(shape, batch, stage, layers) if offloads else 0,
            )
        )
    return found


def _estimate(
    recipe: Recipe, arch: Architecture, layout: Layout, batch: BatchPlan, machine: Machine, stage: int, layers: int
) -> dict[str, int]:
    shape = activations.Shape.of(recipe, arch, layout)
    moving = {"one layer at work": shape.peak_bytes}
    saved = activations.saved_bytes(shape, batch, stage, layers)
    if stage == layout.pipeline - 1:
        # The head is done with before the first layer goes back: the fuller of the two moments counts.
        head = activations.head_bytes(shape, recipe.trainer.head_chunk_tokens)
        if recipe.objective.has_critic:
            head += activations.value_bytes(shape)
        all_saved = activations.layers_in_flight(layout, batch, stage, layers) * shape.kept_bytes
        if all_saved + head > saved + shape.peak_bytes:
            moving, saved = {"head": head}, all_saved
    if not recipe.trainer.offload_activations:
        moving = {"saved activations": saved, **moving}
    if machine.is_cpu:
        return {**moving, "process": PROCESS_BYTES["cpu"]}
    fixed = {"process and NCCL": PROCESS_BYTES["one" if machine.ranks == 1 else "many"]}
    if machine.colocated:
        fixed["sleeping server"] = SLEEPING_SERVER_BYTES
    return {**moving, "allocator slack": int(ALLOCATOR_SHARE * sum(moving.values())), **fixed}
