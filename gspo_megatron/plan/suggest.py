"""Suggest the cheapest single change that makes a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

from gspo_megatron.cluster.machines import Machine, machine_of
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout, round_up
from gspo_megatron.plan.estimate import batch
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory, stage_memory
from gspo_megatron.plan.estimate.trainer_time import trainer_times
from gspo_megatron.plan.rules import layout
from gspo_megatron.plan.rules.resources import fits
from gspo_megatron.plan.units import overrides_text, size
from gspo_megatron.types import Finding

Change = dict[str, Any]


def cheapest_change(recipe: Recipe, machine: Machine) -> str:
    """Return, as a sentence, the first change after which training fits. Changes are tried from fast to slow."""
    for change in _changes(recipe, machine):
        changed = apply(recipe, change)
        where = machine_of(changed) if any(key.startswith("placement") for key in change) else machine
        built = build(changed, where)
        if built is not None and fits(built.stages, where):
            peak = max(stage.peak_bytes for stage in built.stages)
            return f"the cheapest change that fits: {overrides_text(change)} (about {peak / 1e9:.0f} GB)"
    return "no single change fits: take more nodes with more of PP, CP and EP (gspo plan --search lists layouts)"


def spare_recompute(recipe: Recipe, machine: Machine, grid: Layout, cut: BatchPlan) -> tuple[Finding, float] | None:
    """Find recomputation that saves memory which is not needed, and the seconds of a step that it takes."""
    modes = ("none", "selective", "full")
    before = trainer_times(recipe, grid, cut, machine)["training"].seconds
    for mode in modes[: modes.index(recipe.trainer.recompute)]:
        # Only the layer inputs of full recomputation can be offloaded.
        change = {"trainer.recompute": mode, "trainer.offload_activations": False}
        changed = apply(recipe, change)
        stages = stage_memory(changed, grid, cut, machine)
        if fits(stages, machine):
            after = trainer_times(changed, grid, cut, machine)["training"].seconds
            peak = max(stage.peak_bytes for stage in stages)
            message = f"{recipe.trainer.recompute} saves memory that is not needed: {mode} takes about {size(peak)} of "
            message += f"{size(machine.device.memory)} and trains {1 - after / before:.0%} faster"
            fix = f"try trainer.recompute={mode}"
            fix += " trainer.offload_activations=false" if recipe.trainer.offload_activations else ""
            return Finding("memory-to-spare", "info", "trainer.recompute", message, fix), before - after
    return None


@dataclass(frozen=True, slots=True)
class Built:
    """A layout that can be built."""

    layout: Layout
    batch: BatchPlan
    stages: list[StageMemory]


def build(recipe: Recipe, machine: Machine) -> Built | None:
    """Return the layout of a recipe, its batch and the memory of each stage; None if it cannot be built."""
    if refuses(layout.findings(recipe.trainer, recipe.arch, machine)):
        return None
    grid = layout.layout_of(recipe.trainer, machine.ranks)
    cut = batch.plan_batch(recipe, grid)
    if refuses(batch.findings(recipe, grid, cut)):
        return None
    return Built(grid, cut, stage_memory(recipe, grid, cut, machine))


def refuses(found: Iterable[Finding]) -> bool:
    """Whether a finding is an error."""
    return any(finding.severity == "error" for finding in found)


def apply(recipe: Recipe, change: Change) -> Recipe:
    """Return a copy of the recipe with the values of dotted keys changed."""
    for key, value in change.items():
        *sections, name = key.split(".")
        parts = list(accumulate(sections, getattr, initial=recipe))
        for part, inner in zip(reversed(parts), [name, *reversed(sections)], strict=True):
            value = part.model_copy(update={inner: value})
        recipe = value
    return recipe


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), recipe)


def _changes(recipe: Recipe, machine: Machine) -> Iterator[Change]:
    trainer = recipe.trainer
    longest = recipe.rollout.max_sequence_tokens
    if trainer.recompute == "none":
        yield {"trainer.recompute": "selective"}
    if trainer.recompute != "full":
        yield {"trainer.recompute": "full"}
    shortest = round_up(longest, layout.layout_of(trainer, machine.ranks).pad_multiple)
    if trainer.micro_batch_tokens > shortest:
        yield {"trainer.micro_batch_tokens": shortest}
    doubles: tuple[Callable[[], Change], ...] = (
        lambda: {"trainer.expert_parallel": 2 * trainer.expert_parallel},
        lambda: {"trainer.context_parallel": 2 * trainer.context_parallel},
        lambda: {"trainer.tensor_parallel": 2 * trainer.tensor_parallel},
        lambda: {"trainer.pipeline_parallel": 2 * trainer.pipeline_parallel},
    )
    for double in doubles:
        yield double()
        if trainer.recompute != "full":
            yield {**double(), "trainer.recompute": "full"}
    if not machine.is_cpu and trainer.ranks is None:
        yield {"placement.nodes": 2 * machine.nodes}
        yield {"placement.nodes": 2 * machine.nodes, "trainer.expert_parallel": 2 * trainer.expert_parallel}
        for kind in ("h200", "b200"):
            if kind != machine.device.kind:
                yield {"placement.gpu": kind}
