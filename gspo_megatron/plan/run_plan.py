"""The plan of a run: everything that can be said about a recipe before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.cluster import machines
from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.placement_section import GpuKind
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import suggest
from gspo_megatron.plan.estimate import batch, memory, rollout, step_time
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.plan.rules import layout, resources, settings
from gspo_megatron.plan.rules.not_built import not_built
from gspo_megatron.types import Finding


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will be and need."""

    recipe: Recipe
    """As planned, overrides of nodes and GPU kind included."""
    machine: Machine
    """Where it runs."""
    objective: str
    """The effective objective in one sentence."""
    findings: tuple[Finding, ...]
    """Errors first; acknowledged warnings are infos."""
    layout: Layout | None = None
    """None when it cannot be built; then all below is None too."""
    batch: BatchPlan | None = None
    """The algebra of one rollout batch."""
    memory: list[StageMemory] | None = None
    """One entry a pipeline stage; None when a sequence does not fit a micro-batch, as are the next two."""
    rollout: RolloutPlan | None = None
    """The servers."""
    compute: ComputePlan | None = None
    """Operations and time."""

    @property
    def refused(self) -> bool:
        """Whether anything stops the run."""
        return any(finding.severity == "error" for finding in self.findings)


def make_plan(recipe: Recipe, nodes: int | None = None, gpu: GpuKind | None = None) -> Plan:
    """Plan a recipe on the machines it names.

    Args:
        nodes: nodes of the job, instead of `placement.nodes`.
        gpu: kind of every GPU, instead of `placement.gpu`.
    """
    recipe = with_placement(recipe, nodes, gpu)
    return _plan(recipe, machines.machine_of(recipe))


def tell_not_built(plan: Plan) -> Plan:
    """The same plan, which says what the loop does not do yet: a plan may look ahead, `gspo train` refuses."""
    ahead = [replace(finding, severity="info") for finding in not_built(plan.recipe)]
    return replace(plan, findings=(*plan.findings, *ahead))


def with_placement(recipe: Recipe, nodes: int | None = None, gpu: GpuKind | None = None) -> Recipe:
    """The same recipe on other machines."""
    moved: dict[str, Any] = {"nodes": nodes, "gpu": gpu}
    placement = recipe.placement.model_copy(update={key: value for key, value in moved.items() if value is not None})
    return recipe.model_copy(update={"placement": placement})


def check(recipe: Recipe, ranks: int | None = None) -> list[Finding]:
    """Findings about a recipe; with `ranks`, for so many trainer ranks on this one machine."""
    return list(_plan(recipe, machines.machine_of(recipe, ranks)).findings)


def _plan(recipe: Recipe, where: Machine) -> Plan:
    arch = recipe.arch
    found = [*machines.findings(recipe, where), *settings.findings(recipe, arch, where)]
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    sequences = recipe.batch.prompts * recipe.batch.answers // recipe.batch.updates
    sentence = spec.describe(sequences, recipe.batch.updates)
    parts: dict[str, Any] = {}
    if where.ranks > 0:
        refused = list(layout.findings(recipe.trainer, arch, where))
        found += refused
        if not _refuses(refused):
            grid = layout.layout_of(recipe.trainer, where.ranks)
            cut = batch.plan_batch(recipe, grid)
            misfits = list(batch.findings(recipe, grid, cut))
            found += misfits
            parts = {"layout": grid, "batch": cut}
            if not _refuses(misfits):
                parts |= _needs(recipe, arch, where, grid, cut, found)
    return Plan(recipe, where, sentence, **parts, findings=tuple(_settle(found, recipe)))


def _refuses(found: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in found)


def _needs(
    recipe: Recipe, arch: Architecture, where: Machine, grid: Layout, cut: BatchPlan, found: list[Finding]
) -> dict[str, Any]:
    """Memory, servers and time; what they find is added to `found`."""
    stages = memory.stage_memory(recipe, grid, cut, where)
    servers = rollout.plan_rollout(recipe, arch, cut, where)
    work = step_time.plan_compute(recipe, arch, grid, cut, servers, stages, where)
    found += rollout.findings(recipe, arch, where, servers)
    for finding in resources.findings(recipe, arch, where, cut, stages, servers, work):
        found.append(finding if finding.fix else replace(finding, fix=suggest.cheapest_change(recipe, where)))
    found += suggest.spare_recompute(recipe, arch, where, grid, cut)
    return {"memory": stages, "rollout": servers, "compute": work}


def _settle(found: list[Finding], recipe: Recipe) -> Iterator[Finding]:
    """Errors first, acknowledged warnings as infos, acknowledgements of nothing as warnings."""
    settled = [_acknowledge(finding, recipe.acknowledge) for finding in dict.fromkeys(found)]
    raised = {finding.code for finding in found}
    for code, reason in recipe.acknowledge.items():
        if code not in raised:
            told = f"no such warning is raised; the reason given was: {reason}"
            settled.append(Finding("acknowledged-nothing", "warning", f"acknowledge.{code}", told, "remove it"))
    order = {"error": 0, "warning": 1, "info": 2}
    yield from sorted(settled, key=lambda finding: order[finding.severity])


def _acknowledge(finding: Finding, reasons: dict[str, str]) -> Finding:
    reason = reasons.get(finding.code)
    if finding.severity != "warning" or not reason:
        return finding
    return Finding(finding.code, "info", finding.key, f"{finding.message} (acknowledged: {reason})", finding.fix)
