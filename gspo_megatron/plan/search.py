"""`gspo plan --search`: the layouts, server sizes and placements that fit a recipe's model and GPUs, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from gspo_megatron.cluster.machines import Machine, machine_of
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout, round_up
from gspo_megatron.plan.estimate import batch, flops, memory
from gspo_megatron.plan.estimate.rollout import RolloutPlan, plan_rollout
from gspo_megatron.plan.estimate.rollout import findings as rollout_findings
from gspo_megatron.plan.estimate.step_time import plan_compute
from gspo_megatron.plan.estimate.trainer_time import TrainerTime, trainer_times
from gspo_megatron.plan.rules import context_exchange, layout, resources
from gspo_megatron.plan.rules.context_exchange import KIND, SIZES
from gspo_megatron.plan.suggest import apply, value_of

Least = Literal["seconds", "gpu-hours"]
MOST_STAGES, MOST_CONTEXT = 32, 64
"""Most pipeline stages and context-parallel ranks that are tried."""
LEAST_TOKENS = 2048
"""Least tokens of a sequence on one context-parallel rank. Below it, communication costs more than the split saves."""
REFINED = 16
"""Fastest layouts for which chunks, larger micro-batches, expert tensor parallelism and offload are tried."""
KIND_GAIN = 0.05
"""Share of the time by which another way to meet keys and values has to be faster than the ring, which has run most."""
WIDER = (1, 2, 4)
"""Micro-batches that are tried, in sequences of the longest length."""
FEWER = (1, 2, 4)
"""Parts of the nodes, one of which is given to the whole run, when GPU-hours count."""
SPLITS = (4, 3, 2)
"""Parts of the nodes, one of which, or all but one, is given to servers where sampling and training overlap."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trainer layout that fits."""

    change: dict[str, Any]
    """Recipe keys and their values."""
    seconds: float
    """Time of old log-probs and training of one rollout batch, seconds."""
    peak_bytes: int
    """Peak memory of the fullest stage."""
    why: str
    """Parts of the time, in percent."""


@dataclass(frozen=True, slots=True)
class Servers:
    """A way to divide the rollout GPUs into servers."""

    change: dict[str, Any]
    """Recipe keys and their values."""
    plan: RolloutPlan
    """Memory and speed."""


@dataclass(frozen=True, slots=True)
class Found:
    """What fits one placement."""

    machine: Machine
    """Its nodes."""
    layouts: list[Candidate]
    """Fastest first."""
    servers: list[Servers]
    """Fastest first."""
    seconds: float
    """A whole step with the first of each, seconds; infinite if nothing fits."""

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of a step."""
        return self.seconds * self.machine.devices

    @property
    def change(self) -> dict[str, Any]:
        """The keys of the fastest whole."""
        placed = {"placement.nodes": self.machine.nodes, "placement.rollout_nodes": self.machine.rollout_nodes}
        return {**placed, **self.layouts[0].change, **(self.servers[0].change if self.servers else {})}


def search(recipe: Recipe, least: Least = "seconds") -> list[Found]:
    """Return what fits on each placement of the machines that a recipe names, the least first.

    Servers get nodes of their own only where the recipe lets sampling and training overlap: elsewhere half of the GPUs
    would wait for the others.

    Args:
        least: `seconds` of a step; or `gpu-hours` of a run, for which fewer nodes are tried as well.
    """
    parts = FEWER if least == "gpu-hours" else (1,)
    counts = sorted({recipe.placement.nodes // part for part in parts} - {0}, reverse=True)
    found = [one for nodes in counts for one in _search_nodes(recipe, nodes)]
    return sorted(found, key=lambda one: one.gpu_seconds if least == "gpu-hours" else one.seconds)


def _search_nodes(recipe: Recipe, nodes: int) -> Iterator[Found]:
    parts = {nodes // part for part in SPLITS} | {nodes - nodes // part for part in SPLITS}
    tried = {recipe.placement.rollout_nodes, 0, *parts} if recipe.rollout.max_staleness else {0}
    for apart in sorted(apart for apart in tried if apart < nodes):
        yield _search_placement(apply(recipe, {"placement.nodes": nodes, "placement.rollout_nodes": apart}))


def _search_placement(recipe: Recipe) -> Found:
    machine = machine_of(recipe)
    if machine.ranks < 1:
        return Found(machine, [], [], float("inf"))
    layouts, servers = search_layouts(recipe, machine), search_servers(recipe, machine)
    seconds = float("inf")
    if layouts and servers:
        seconds = whole_step(apply(recipe, {**layouts[0].change, **servers[0].change}), machine)
    return Found(machine, layouts, servers, seconds)


def whole_step(recipe: Recipe, machine: Machine) -> float:
    """Return the planned seconds of a step."""
    arch, grid = recipe.arch, layout.layout_of(recipe.trainer, machine.ranks)
    cut = batch.plan_batch(recipe, grid)
    stages = memory.stage_memory(recipe, grid, cut, machine)
    servers = plan_rollout(recipe, arch, cut, machine)
    return plan_compute(recipe, arch, grid, cut, servers, stages, machine).seconds_per_step


def search_layouts(recipe: Recipe, machine: Machine) -> list[Candidate]:
    """Return every layout that can be built and fits, fastest first. Of equal ones the simpler comes first."""
    arch = recipe.arch
    plain = [one for change in _layouts(recipe, arch, machine) if (one := _judge(recipe, arch, machine, change))]
    plain.sort(key=_order)
    better = [_refine(recipe, arch, machine, one) for one in plain[:REFINED]]
    return sorted([*better, *plain[REFINED:]], key=_order)


def _order(one: Candidate) -> tuple[float, int, int]:
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    return round(one.seconds, 1), sum(one.change[f"trainer.{name}"] > 1 for name in sizes), one.peak_bytes


def search_servers(recipe: Recipe, machine: Machine) -> list[Servers]:
    """Return the server sizes that fit, fastest rollout batch first."""
    arch = recipe.arch
    cut = batch.plan_batch(recipe, layout.layout_of(recipe.trainer.model_copy(update=_PLAIN), 1))
    found = []
    for tensor, pipeline in product(_divisors(machine.per_node, machine.per_node), (1, 2, 4)):
        if machine.rollout_devices % (tensor * pipeline):
            continue
        # Ranks beyond the key-value heads hold copies of the KV, or share it by position.
        shared = {1, max(1, tensor // arch.num_key_value_heads)}
        for context in sorted(shared):
            change = {
                "rollout.servers": machine.rollout_devices // (tensor * pipeline),
                "rollout.tensor_parallel": tensor,
                "rollout.pipeline_parallel": pipeline,
                "rollout.decode_context_parallel": context,
            }
            changed = apply(recipe, change)
            plan = plan_rollout(changed, arch, cut, machine)
            if not any(f.severity == "error" for f in rollout_findings(changed, arch, machine, plan)):
                found.append(Servers(change, plan))
    return sorted(found, key=lambda one: one.plan.seconds)


_PLAIN = {
    "tensor_parallel": 1, "pipeline_parallel": 1, "context_parallel": 1, "expert_parallel": 1,
    "expert_tensor_parallel": 1, "virtual_pipeline": None, "first_stage_layers": None, "last_stage_layers": None,
}  # fmt: skip


def _layouts(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield candidate layouts: TP inside a node, sizes that divide, enough tokens per rank."""
    longest = recipe.rollout.max_sequence_tokens
    for pipeline in _divisors(machine.ranks, min(arch.num_hidden_layers, MOST_STAGES)):
        ends = layout.even_ends(pipeline, arch.num_hidden_layers)
        if ends is None:
            continue
        stage = machine.ranks // pipeline
        for tensor in _divisors(stage, min(machine.domain, arch.num_attention_heads)):
            for context in _divisors(stage // tensor, MOST_CONTEXT):
                if context > 1 and longest / context < LEAST_TOKENS:
                    continue
                multiple = 2 * context * tensor if context > 1 else tensor
                base = {
                    "trainer.tensor_parallel": tensor,
                    "trainer.context_parallel": context,
                    # As the recipe says, where the layout can.
                    "trainer.dynamic_context_parallel": (
                        recipe.trainer.dynamic_context_parallel and context > 1 and not context & (context - 1)
                    ),
                    **_exchange(recipe, arch, tensor, context),
                    "trainer.pipeline_parallel": pipeline,
                    "trainer.first_stage_layers": ends[0],
                    "trainer.last_stage_layers": ends[1],
                    "trainer.virtual_pipeline": None,
                    "trainer.expert_tensor_parallel": 1,
                    "trainer.offload_activations": False,
                    "trainer.micro_batch_tokens": round_up(longest, multiple),
                }
                for expert in _divisors(stage, arch.num_experts or 1):
                    yield {**base, "trainer.expert_parallel": expert}


def _exchange(recipe: Recipe, arch: Architecture, tensor: int, context: int) -> dict[str, Any]:
    """As the recipe says, where the layout can."""
    sizes = {"trainer.tensor_parallel": tensor, "trainer.context_parallel": context}
    given = {key: value_of(recipe, key) if context > 1 else None for key in (KIND, SIZES)}
    can = not any(context_exchange.findings(apply(recipe, {**sizes, **given}).trainer, arch))
    return given if can else dict.fromkeys(given)


def _refine(recipe: Recipe, arch: Architecture, machine: Machine, one: Candidate) -> Candidate:
    """Return the fastest variation of a layout."""
    change = one.change
    stages, tensor = change["trainer.pipeline_parallel"], change["trainer.tensor_parallel"]
    depth = -(-arch.num_hidden_layers // stages)
    chunks = [None, *(count for count in _divisors(depth, 8) if count > 1)] if stages > 1 else [None]
    found = [one]
    for wider, virtual in product(WIDER, chunks):
        tokens = wider * change["trainer.micro_batch_tokens"]
        tried = {**change, "trainer.micro_batch_tokens": tokens, "trainer.virtual_pipeline": virtual}
        variations = [tried, {**tried, "trainer.offload_activations": True}]
        if tensor > 1 and arch.num_experts and not virtual and wider == 1:
            variations.append({**tried, "trainer.expert_tensor_parallel": tensor})
        found += [other for variation in variations if (other := _judge(recipe, arch, machine, variation))]
    best = min(found, key=_order)
    if value_of(recipe, KIND):
        return best
    trainer = apply(recipe, best.change).trainer
    kinds = [{**best.change, **kind} for kind in context_exchange.other_kinds(trainer, arch, machine)]
    others = [other for change in kinds if (other := _judge(recipe, arch, machine, change))]
    faster = [other for other in others if other.seconds < (1 - KIND_GAIN) * best.seconds]
    return min(faster, default=best, key=_order)


def _divisors(of: int, most: int) -> list[int]:
    return [size for size in range(1, min(of, most) + 1) if of % size == 0]


def _judge(recipe: Recipe, arch: Architecture, machine: Machine, change: dict[str, Any]) -> Candidate | None:
    """Return time and memory of a layout with the least recomputation that fits, or None if none fits."""
    changed = apply(recipe, change)
    if any(finding.severity != "info" for finding in layout.findings(changed.trainer, arch, machine)):
        return None
    grid = layout.layout_of(changed.trainer, machine.ranks)
    if _least_bytes(arch, grid) > machine.device.memory:
        return None
    cut = batch.plan_batch(changed, grid)
    if any(finding.severity != "info" for finding in batch.findings(changed, grid, cut)):
        return None
    # Only the layer inputs of full recomputation can be offloaded.
    modes = ("full",) if change["trainer.offload_activations"] else ("none", "selective", "full")
    if recipe.trainer.megatron.given().get("recompute_modules"):
        # The recipe chose what is repeated, which no other mode does.
        modes = tuple(mode for mode in modes if mode == "selective")
    for mode in modes:
        tried = apply(changed, {"trainer.recompute": mode})
        stages = memory.stage_memory(tried, grid, cut, machine)
        if resources.fits(stages, machine):
            if sum(resources.host_bytes(tried, arch, machine, cut, stages).values()) > machine.host_memory:
                return None
            time = _total(tried, grid, cut, machine)
            peak = max(stage.peak_bytes for stage in stages)
            return Candidate({**change, "trainer.recompute": mode}, time.seconds, peak, time.words())
    return None


def _least_bytes(arch: Architecture, grid: Layout) -> int:
    """Return the bytes of expert weights and gradients. They rule out most layouts before parameters are listed."""
    experts = arch.num_hidden_layers * arch.num_experts * flops.expert_parameters(arch)
    return 6 * experts // (grid.expert * grid.expert_tensor * grid.pipeline)


def _total(recipe: Recipe, grid: Layout, cut: batch.BatchPlan, machine: Machine) -> TrainerTime:
    scoring, training = trainer_times(recipe, grid, cut, machine).values()
    return scoring + training
