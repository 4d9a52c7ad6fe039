"""The plan of a run: all that is known about a recipe before anything is queued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gspo_megatron.cluster import machines
from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.placement_section import GpuKind
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan import neighbours, suggest
from gspo_megatron.plan.estimate import batch, memory, rollout, step_time
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.plan.rules import (
    data_files,
    durations,
    held_out,
    layout,
    metric_sinks,
    model_files,
    own_programs,
    own_reward,
    resources,
    resume,
    run_directory,
    settings,
    token_advantages,
)
from gspo_megatron.types import Finding

SEVERITIES = ("error", "warning", "info")
"""In the order in which findings are shown."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout, sizes, memory, time and findings of a run."""

    recipe: Recipe
    """The recipe with the overrides of nodes and GPU kind applied."""
    machine: Machine
    """The machines that it runs on."""
    objective: str
    """The effective objective in one sentence."""
    findings: tuple[Finding, ...]
    """Findings, errors first. Acknowledged warnings have severity info."""
    layout: Layout | None = None
    """None if it cannot be built; then all fields below are None."""
    batch: BatchPlan | None = None
    """Sizes of one rollout batch."""
    memory: list[StageMemory] | None = None
    """One entry per pipeline stage. None if a sequence does not fit a micro-batch; then the next two are None too."""
    rollout: RolloutPlan | None = None
    """Memory and speed of the vLLM servers."""
    compute: ComputePlan | None = None
    """FLOPs and time."""
    shares: dict[str, float] = field(default_factory=dict)
    """Code of an info -> share of a step that it is about, where that is known."""

    @property
    def refused(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity == "error" for finding in self.findings)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Findings with the errors first, else in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def make_plan(recipe: Recipe, nodes: int | None = None, gpu: GpuKind | None = None, runs_here: bool = False) -> Plan:
    """Plan a recipe on the machines it names.

    Args:
        nodes: number of nodes, instead of `placement.nodes`.
        gpu: kind of every GPU, instead of `placement.gpu`.
        runs_here: whether it starts from this machine, which then has every file and package that it needs.
    """
    recipe = with_placement(recipe, nodes, gpu)
    return _plan(recipe, machines.machine_of(recipe), runs_here)


def add_contents(plan: Plan) -> Plan:
    """Add what the files of problems and tokenizer hold, as far as they are here."""
    found = [*plan.findings, *read_contents(plan.recipe, runs_here=False)]
    return replace(plan, findings=tuple(by_severity(found)))


def read_contents(recipe: Recipe, runs_here: bool) -> list[Finding]:
    """Return the findings about what the files of problems and tokenizer hold.

    Args:
        runs_here: whether the run starts from this machine.
    """
    found = data_files.read_findings(recipe, runs_here)
    return [_acknowledge(finding, recipe.acknowledge) for finding in dict.fromkeys(found)]


def with_placement(recipe: Recipe, nodes: int | None = None, gpu: GpuKind | None = None) -> Recipe:
    """Return a copy of the recipe for other machines."""
    changed: dict[str, Any] = {"nodes": nodes, "gpu": gpu}
    changed = {key: value for key, value in changed.items() if value is not None}
    if gpu is not None:
        changed["device"] = None
    placement = recipe.placement.model_copy(update=changed)
    return recipe.model_copy(update={"placement": placement})


def check(recipe: Recipe, ranks: int | None = None) -> list[Finding]:
    """Return the findings of a recipe.

    Args:
        ranks: number of trainer ranks, all on this machine; None = the machines that the recipe names.
    """
    return list(_plan(recipe, machines.machine_of(recipe, ranks), runs_here=ranks is not None).findings)


def check_evaluation(recipe: Recipe) -> list[Finding]:
    """Return the findings of a recipe that is evaluated on this machine: those that need no trainer."""
    found = [*held_out.findings(recipe), *model_files.findings(recipe, recipe.arch, runs_here=True)]
    found += [*data_files.findings(recipe, runs_here=True), *own_reward.findings(recipe, runs_here=True)]
    found += own_programs.findings(recipe)
    return by_severity(found)


def _plan(recipe: Recipe, where: Machine, runs_here: bool) -> Plan:
    arch = recipe.arch
    found = [*machines.findings(recipe, where), *settings.findings(recipe, arch, where)]
    found += [*model_files.findings(recipe, arch, runs_here), *data_files.findings(recipe, runs_here)]
    found += [*metric_sinks.findings(recipe, runs_here), *own_reward.findings(recipe, runs_here)]
    found += [*own_programs.findings(recipe), *token_advantages.findings(recipe, runs_here)]
    found += [*run_directory.findings(recipe), *resume.findings(recipe)]
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    sequences = recipe.batch.prompts * recipe.batch.answers // recipe.batch.updates
    sentence = spec.describe(sequences, recipe.batch.updates)
    parts: dict[str, Any] = {}
    if where.ranks > 0:
        refused = list(layout.findings(recipe.trainer, arch, where))
        found += refused
        if not suggest.refuses(refused):
            grid = layout.layout_of(recipe.trainer, where.ranks)
            cut = batch.plan_batch(recipe, grid)
            misfits = list(batch.findings(recipe, grid, cut))
            found += misfits
            parts = {"layout": grid, "batch": cut}
            if not suggest.refuses(misfits):
                parts |= _resources(recipe, arch, where, grid, cut, found)
    return Plan(recipe, where, sentence, **parts, findings=tuple(_settle(found, recipe)))


def _resources(
    recipe: Recipe, arch: Architecture, where: Machine, grid: Layout, cut: BatchPlan, found: list[Finding]
) -> dict[str, Any]:
    """Estimate memory, servers and time. Their findings are added to `found`."""
    stages = memory.stage_memory(recipe, grid, cut, where)
    servers = rollout.plan_rollout(recipe, arch, cut, where)
    work = step_time.plan_compute(recipe, arch, grid, cut, servers, stages, where)
    found += rollout.findings(recipe, arch, where, servers)
    for finding in resources.findings(recipe, arch, where, cut, stages, servers, work):
        found.append(finding if finding.fix else replace(finding, fix=suggest.cheapest_change(recipe, where)))
    found += durations.findings(recipe, arch, where, grid, servers, work)
    spare = suggest.spare_recompute(recipe, where, grid, cut)
    found += [spare[0]] if spare else []
    shares = {"memory-to-spare": spare[1] if spare else 0.0, "experts-cross-nodes": work.exchange_seconds}
    raised = {finding.code for finding in found}
    near = [] if suggest.refuses(found) else list(neighbours.findings(recipe, where, work.seconds_per_step))
    found += [finding for finding, _ in near]
    shares = {code: seconds / work.seconds_per_step for code, seconds in shares.items() if code in raised}
    shares |= {finding.code: share for finding, share in near}
    return {"memory": stages, "rollout": servers, "compute": work, "shares": shares}


def _settle(found: list[Finding], recipe: Recipe) -> Iterator[Finding]:
    """Order the findings, turn acknowledged warnings into infos, and warn about acknowledgements without a warning."""
    settled = [_acknowledge(finding, recipe.acknowledge) for finding in dict.fromkeys(found)]
    raised = {finding.code for finding in found} | data_files.CONTENT_WARNINGS
    for code, reason in recipe.acknowledge.items():
        if code not in raised:
            message = f"no warning with this code is raised; the reason given was: {reason}"
            settled.append(Finding("acknowledged-nothing", "warning", f"acknowledge.{code}", message, "remove it"))
    yield from by_severity(settled)


def _acknowledge(finding: Finding, reasons: dict[str, str]) -> Finding:
    reason = reasons.get(finding.code)
    if finding.severity != "warning" or not reason:
        return finding
    return Finding(finding.code, "info", finding.key, f"{finding.message} (acknowledged: {reason})", finding.fix)
