"""Time limits, intervals and sizes that do not fit the plan's own seconds and bytes."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.memory import exact_bytes, has_expert_buffers, held_by
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.types import ITEM_BYTES, Finding

AT_RISK_HOURS = 12.0
"""Work that a lost node may cost before a warning says so."""
READ_SPEED = 5e9
"""Bytes/s at which a server reads its weights from a shared file system, at best."""
SERVER_START_SECONDS = {"cpu": 15.0, "gpu": 45.0}
"""Least time of a server's start without its weights: imports, engine, graphs."""
EVALUATION_SHARE = 0.5
"""Share of the run's time in evaluations above which a warning says so."""
FREE_FACTOR = 4
"""Times that KV memory could hold what `rollout.max_concurrency` allows, before a warning says so."""


def findings(
    recipe: Recipe, arch: Architecture, machine: Machine, layout: Layout, rollout: RolloutPlan, compute: ComputePlan
) -> Iterator[Finding]:
    """Hold limits and intervals against the plan."""
    yield from _checkpoints(recipe, compute)
    yield from _timeouts(recipe, arch, machine, compute)
    yield from _evaluation(recipe, compute)
    yield from _concurrency(recipe, machine, rollout)
    if not recipe.trainer.distributed_optimizer and layout.data * layout.context > 1 and not machine.is_cpu:
        yield _replicated_states(recipe, arch, layout)


def _replicated_states(recipe: Recipe, arch: Architecture, layout: Layout) -> Finding:
    """Optimizer states that every replica holds. Experts have fewer replicas than the rest."""
    held, element = held_by(arch, layout, 0, recipe.objective.has_critic), ITEM_BYTES[recipe.model.dtype]
    whole, cut = (
        sum(size for name, size in exact_bytes(held, layout, element, on, on_cpu=False).items() if "optimizer" in name)
        for on in (False, True)
    )
    replicas = f"{layout.data * layout.context} data-parallel ranks"
    if arch.num_experts and has_expert_buffers(layout):
        replicas += f" ({layout.expert_data} of them for an expert)"
    return Finding(
        "optimizer-not-distributed", "warning", "trainer.distributed_optimizer",
        f"false: each of {replicas} holds the same optimizer states, {whole / 1e9:.1f} GB",
        f"set it to true: states take {cut / 1e9:.1f} GB, 1/{whole / cut:.1f} of it, at the same result",
    )  # fmt: skip


def _checkpoints(recipe: Recipe, compute: ComputePlan) -> Iterator[Finding]:
    every, steps = recipe.checkpoint.every, recipe.trainer.max_steps
    between = compute.seconds_per_step * min(every or steps, steps) / 3600
    # A short run that is lost is started again.
    limit = AT_RISK_HOURS if every else 1.0
    if between > limit:
        what = f"{every} steps" if every else "0: no checkpoint before the job receives SIGUSR1"
        best = max(1, int(3600 / compute.seconds_per_step))
        hours = best * compute.seconds_per_step / 3600
        fix = f"set it to {best}, about {'an hour' if hours < 1.1 else f'{hours:.1f} h'}"
        if best == every:
            fix = "make a step shorter: more nodes, or fewer prompts or responses"
        yield Finding(
            "checkpoints-far-apart", "warning", "checkpoint.every",
            f"{what}; a lost node costs up to {between:.1f} h of work", fix,
        )  # fmt: skip


def _timeouts(recipe: Recipe, arch: Architecture, machine: Machine, compute: ComputePlan) -> Iterator[Finding]:
    weights = flops.parameters(arch) * ITEM_BYTES[recipe.model.dtype]
    least = SERVER_START_SECONDS["cpu" if machine.is_cpu else "gpu"] + weights / READ_SPEED
    if recipe.rollout.start_timeout < least:
        yield Finding(
            "timeout-too-short", "warning", "rollout.start_timeout",
            f"{recipe.rollout.start_timeout:g} s, but a server takes at least {least:.0f} s to start and to read "
            f"{weights / 1e9:.1f} GB of weights",
            f"set it to {max(600, 5 * round(least))}",
        )  # fmt: skip
    planned = 2 * compute.seconds["weight update"]
    if recipe.weight_update.timeout < max(1.0, planned):
        yield Finding(
            "timeout-too-short", "warning", "weight_update.timeout",
            f"{recipe.weight_update.timeout:g} s, but an update is planned to take {planned / 2:.1f} s, and a slow "
            "network doubles it",
            f"set it to {max(60, 10 * round(planned))}",
        )  # fmt: skip


def _evaluation(recipe: Recipe, compute: ComputePlan) -> Iterator[Finding]:
    seconds = compute.seconds.get("evaluation", 0.0)
    if seconds > EVALUATION_SHARE * compute.seconds_per_step:
        evaluation = recipe.evaluation
        yield Finding(
            "evaluation-dominates", "warning", "evaluation.every",
            f"{recipe.planned_evaluation} problems x {evaluation.answers} responses every {evaluation.every} step(s) "
            f"take {seconds / compute.seconds_per_step:.0%} of the run",
            "evaluate less often, or fewer problems or responses",
        )  # fmt: skip


def _concurrency(recipe: Recipe, machine: Machine, rollout: RolloutPlan) -> Iterator[Finding]:
    allowed = recipe.rollout.max_concurrency
    waiting = recipe.batch.prompts * recipe.batch.answers // rollout.servers
    room = min(rollout.answers_at_mean, waiting)
    if not machine.is_cpu and FREE_FACTOR * allowed < room:
        yield Finding(
            "concurrency-below-kv", "warning", "rollout.max_concurrency",
            f"{allowed}, but a server has KV memory for {rollout.answers_at_mean} responses of mean length and "
            f"{waiting} to decode: decoding reads the weights {room // allowed} times as often as it has to",
            f"set it to {min(1024, 1 << (room - 1).bit_length())}",
        )  # fmt: skip
