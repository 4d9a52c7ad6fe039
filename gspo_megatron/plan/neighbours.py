"""Recipes that differ in one key and are clearly better: what a wasteful layout is named by."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.cluster.machines import Machine, machine_of
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.estimate import rollout, step_time
from gspo_megatron.plan.rules import context_exchange, resources
from gspo_megatron.plan.suggest import Change, apply, build, refuses
from gspo_megatron.plan.units import overrides_text
from gspo_megatron.types import Finding

LEAST_GAIN = 0.1
"""Share of a step's seconds. Estimates of two layouts of one recipe differ by less from their ratio as measured."""
LEAST_SAVING = 0.4
"""Share of the GPU-hours, of half the nodes: a step then takes at most a fifth longer."""


def findings(recipe: Recipe, where: Machine, seconds: float) -> Iterator[tuple[Finding, float]]:
    """Find the best single change, and half the nodes; each with the share of the step that it is
    about, 0 where it is about something else.

    Args:
        recipe: it fits its machine.
        where: its machine.
        seconds: of one of its steps.
    """
    if where.is_cpu:
        return
    faster = [(found, change) for change in _changes(recipe) if (found := _seconds(apply(recipe, change))) is not None]
    best, change = min(faster, default=(seconds, {}), key=lambda pair: pair[0])
    gain = 1 - best / seconds
    if gain >= LEAST_GAIN:
        message = f"with {overrides_text(change)} it fits too, and a step takes {gain:.0%} fewer seconds"
        yield Finding("faster-change", "info", next(iter(change)), message, "`gspo plan --search` lists more"), gain
    if recipe.trainer.ranks is None and where.nodes > 1:
        fewer = _half(recipe)
        longer, nodes = _seconds(apply(recipe, fewer)), fewer["placement.nodes"]
        if longer is None:
            return
        saved = 1 - longer * nodes / (seconds * where.nodes)
        if saved >= LEAST_SAVING:
            message = (
                f"{nodes} would take {saved:.0%} fewer GPU-hours and {max(longer / seconds - 1, 0):.0%} more seconds"
            )
            yield Finding("nodes-to-spare", "info", "placement.nodes", message, f"try {overrides_text(fewer)}"), 0.0


def _half(recipe: Recipe) -> Change:
    """Half the nodes, the part of the servers among them."""
    placement = recipe.placement
    change: Change = {"placement.nodes": -(-placement.nodes // 2)}
    if placement.rollout_nodes:
        change["placement.rollout_nodes"] = max(1, placement.rollout_nodes // 2)
    return change | {"rollout.servers": min(recipe.rollout.servers, _room(apply(recipe, change)))}


def _room(recipe: Recipe) -> int:
    """Servers that the GPUs of its rollout nodes hold."""
    size = recipe.rollout.tensor_parallel * recipe.rollout.pipeline_parallel
    return max(1, machine_of(recipe).rollout_devices // size)


def _changes(recipe: Recipe) -> Iterator[Change]:
    for change in _other_trainers(recipe):
        yield change
        if recipe.trainer.recompute != "full":
            yield change | {"trainer.recompute": "full"}
    for change in _other_servers(recipe):
        yield change | {"rollout.servers": _room(apply(recipe, change))}


def _other_trainers(recipe: Recipe) -> Iterator[Change]:
    trainer = recipe.trainer
    for name in ("tensor_parallel", "context_parallel", "pipeline_parallel", "expert_parallel"):
        now = getattr(trainer, name)
        for value in {1, now // 2, 2 * now} - {0, now}:
            change: Change = {f"trainer.{name}": value}
            yield change | ({"trainer.virtual_pipeline": None} if name == "pipeline_parallel" else {})
    yield from context_exchange.other_kinds(trainer, recipe.arch, machine_of(recipe))
    if trainer.offload_activations:
        yield {"trainer.offload_activations": False}
    yield {"trainer.micro_batch_tokens": 2 * trainer.micro_batch_tokens}


def _other_servers(recipe: Recipe) -> Iterator[Change]:
    size, nodes = recipe.rollout.tensor_parallel, recipe.placement.rollout_nodes
    for value in {1, size // 2, 2 * size} - {0, size}:
        yield {"rollout.tensor_parallel": value}
    for value in {nodes // 2, 2 * nodes, nodes - 1, nodes + 1} if nodes else ():
        if 0 <= value < recipe.placement.nodes and value != nodes:
            yield {"placement.rollout_nodes": value}


def _seconds(recipe: Recipe) -> float | None:
    """Seconds of a step; None for what cannot be built or does not fit."""
    where, arch = machine_of(recipe), recipe.arch
    built = build(recipe, where) if where.ranks > 0 else None
    if built is None:
        return None
    grid, cut, stages = built.layout, built.batch, built.stages
    servers = rollout.plan_rollout(recipe, arch, cut, where)
    if refuses(rollout.findings(recipe, arch, where, servers)):
        return None
    work = step_time.plan_compute(recipe, arch, grid, cut, servers, stages, where)
    refused = refuses(resources.findings(recipe, arch, where, cut, stages, servers, work))
    return None if refused else work.seconds_per_step
