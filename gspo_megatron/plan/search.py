"""`gspo plan --search`: the layouts that fit a recipe's model, lengths and GPUs, ordered by estimated time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gspo_megatron.cluster.machines import Machine, machine_of
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout, round_up
from gspo_megatron.plan.estimate import batch, flops, memory
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.rollout import RolloutPlan, plan_rollout
from gspo_megatron.plan.estimate.rollout import findings as rollout_findings
from gspo_megatron.plan.estimate.trainer_time import TrainerTime, trainer_times
from gspo_megatron.plan.rules import layout, resources
from gspo_megatron.plan.suggest import apply

SHOWN = 8
"""Number of layouts and of server sizes that are printed."""
MOST_STAGES, MOST_CONTEXT = 32, 64
"""Most pipeline stages and context-parallel ranks that are tried."""
LEAST_TOKENS = 2048
"""Least tokens of a sequence on one context-parallel rank. Below it, communication costs more than the split saves."""


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


def search_layouts(recipe: Recipe, machine: Machine) -> list[Candidate]:
    """Return every layout that can be built and fits, fastest first. Of equal ones the simpler comes first."""
    arch = recipe.arch
    found = []
    for change in _layouts(recipe, arch, machine):
        candidate = _judge(recipe, arch, machine, change)
        if candidate is not None:
            found.append(candidate)
    return sorted(found, key=lambda one: (round(one.seconds, 1), _complexity(one.change), one.peak_bytes))


def search_servers(recipe: Recipe, machine: Machine) -> list[Servers]:
    """Return the server sizes that fit, fastest rollout batch first."""
    arch = recipe.arch
    cut = batch.plan_batch(recipe, layout.layout_of(recipe.trainer.model_copy(update=_PLAIN), 1))
    found = []
    for tensor in _divisors(machine.per_node, machine.per_node):
        for pipeline in (1, 2, 4):
            if machine.rollout_devices % (tensor * pipeline):
                continue
            servers = machine.rollout_devices // (tensor * pipeline)
            change = {
                "rollout.servers": servers,
                "rollout.tensor_parallel": tensor,
                "rollout.pipeline_parallel": pipeline,
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
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_answer_tokens
    for pipeline in _divisors(machine.ranks, min(arch.num_hidden_layers, MOST_STAGES)):
        ends = layout.even_ends(pipeline, arch.num_hidden_layers)
        if ends is None:
            continue
        stage = machine.ranks // pipeline
        for tensor in _divisors(stage, machine.per_node):
            for context in _divisors(stage // tensor, MOST_CONTEXT):
                if context > 1 and longest / context < LEAST_TOKENS:
                    continue
                multiple = 2 * context * tensor if context > 1 else tensor
                base = {
                    "trainer.tensor_parallel": tensor,
                    "trainer.context_parallel": context,
                    "trainer.pipeline_parallel": pipeline,
                    "trainer.first_stage_layers": ends[0],
                    "trainer.last_stage_layers": ends[1],
                    "trainer.virtual_pipeline": None,
                    "trainer.expert_tensor_parallel": 1,
                    "trainer.offload_activations": False,
                    "trainer.micro_batch_tokens": max(recipe.trainer.micro_batch_tokens, round_up(longest, multiple)),
                }
                for expert in _divisors(stage, arch.num_experts or 1):
                    yield {**base, "trainer.expert_parallel": expert}


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
    for mode in ("none", "selective", "full"):
        tried = apply(changed, {"trainer.recompute": mode})
        stages = memory.stage_memory(tried, grid, cut, machine)
        if resources.fits(stages, machine):
            time = _total(tried, arch, grid, cut, machine)
            peak = max(stage.peak_bytes for stage in stages)
            return Candidate({**change, "trainer.recompute": mode}, time.seconds, peak, time.words())
    return None


def _least_bytes(arch: Architecture, grid: Layout) -> int:
    """Return the bytes of expert weights and gradients. They rule out most layouts before parameters are listed."""
    experts = arch.num_hidden_layers * arch.num_experts * flops.expert_parameters(arch)
    return 6 * experts // (grid.expert * grid.expert_tensor * grid.pipeline)


def _total(recipe: Recipe, arch: Architecture, grid: Layout, cut: BatchPlan, machine: Machine) -> TrainerTime:
    scoring, training = trainer_times(recipe, grid, cut, machine).values()
    return scoring + training


def _complexity(change: dict[str, Any]) -> int:
    """Count the parallel dimensions in use. Of layouts with equal time the simpler one is listed first."""
    sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel")
    return sum(change[f"trainer.{name}"] > 1 for name in sizes)


def search(recipe: Recipe) -> tuple[Machine, list[Candidate], list[Servers]]:
    """Return layouts and server sizes for the machines that a recipe names. Both are empty if nothing fits."""
    machine = machine_of(recipe)
    if machine.ranks < 1:
        return machine, [], []
    return machine, search_layouts(recipe, machine), search_servers(recipe, machine)


def print_search(recipe: Recipe, as_json: bool) -> int:
    """Print the result. Returns 0 if a layout and a server size fit, else 2."""
    machine, layouts, servers = search(recipe)
    if as_json:
        shown = {"layouts": [asdict(one) for one in layouts], "servers": [asdict(one) for one in servers]}
        print(json.dumps(shown, indent=1))
    else:
        for line in _lines(machine, layouts, servers):
            print(line)
    return 0 if layouts and (servers or machine.is_cpu) else 2


def _lines(machine: Machine, layouts: list[Candidate], servers: list[Servers]) -> Iterator[str]:
    device = machine.device
    where = f"{machine.ranks} trainer ranks on {machine.nodes} node(s) x {machine.per_node} {device.kind.upper()}"
    yield f"{len(layouts)} layouts fit {where}; the first {min(SHOWN, len(layouts))}, fastest first:"
    yield f"{'TP':>3} {'CP':>3} {'PP':>3} {'EP':>4} recompute  {'s/step':>7} {'GB':>6}  why"
    for one in layouts[:SHOWN]:
        sizes = [one.change[f"trainer.{name}_parallel"] for name in ("tensor", "context", "pipeline", "expert")]
        yield (
            f"{sizes[0]:>3} {sizes[1]:>3} {sizes[2]:>3} {sizes[3]:>4} {one.change['trainer.recompute']:<9}  "
            f"{one.seconds:>7,.0f} {one.peak_bytes / 1e9:>6.1f}  {one.why}"
        )
    if layouts:
        yield "as overrides: " + _overrides(layouts[0].change)
    else:
        yield "none: take more nodes, a GPU with more memory, or shorter responses"
    yield ""
    yield f"{len(servers)} ways to divide {machine.rollout_devices} GPUs into servers, fastest batch first:"
    yield f"{'servers':>7} {'TP':>3} {'PP':>3} {'responses at limit':>21} {'tokens/s':>9} {'s/batch':>8}"
    for two in servers[:SHOWN]:
        tensor, pipeline = two.change["rollout.tensor_parallel"], two.change["rollout.pipeline_parallel"]
        yield (
            f"{two.plan.servers:>7} {tensor:>3} {pipeline:>3} {two.plan.answers_at_limit:>21} "
            f"{two.plan.tokens_per_second * two.plan.servers:>9,.0f} {two.plan.seconds:>8,.0f}"
        )
    if servers:
        yield "as overrides: " + _overrides(servers[0].change)


def _overrides(change: dict[str, Any]) -> str:
    # As JSON: a recipe takes `true` and `null`, not `True` and `None`.
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items())
