"""Convert a plan to one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.rules import resources
from gspo_megatron.plan.rules.layout import rank_table, spans
from gspo_megatron.plan.run_plan import Plan

VERSION = 2
"""Of the object's keys; README.md says what they hold. 2: `compute` has ranges, times with all parts of a step."""


def to_json(plan: Plan, with_ranks: bool = False) -> dict[str, Any]:
    """Convert the whole plan. Parts that a refused recipe does not have are null.

    Args:
        with_ranks: add the coordinates of every rank to `layout`.
    """
    arch = plan.recipe.arch
    return {
        "version": VERSION,
        "recipe": plan.recipe.run.name,
        "machine": _machine(plan.machine),
        "model": {
            "parameters": flops.parameters(arch),
            "active_parameters": flops.active_parameters(arch),
            "kv_bytes_per_token": flops.kv_bytes(arch),
            "route_bytes_per_token": flops.route_bytes(arch),
        },
        "objective": plan.objective,
        "reward": plan.recipe.reward.describe(),
        "teacher": None if plan.recipe.teacher is None else plan.recipe.teacher.describe(),
        "learning_rate": plan.recipe.optimizer.describe(plan.recipe.total_updates),
        "layout": None if plan.layout is None else _layout(plan, plan.layout, with_ranks),
        "batch": None if plan.batch is None else {**asdict(plan.batch), "words": plan.batch.words()},
        "memory": None if plan.memory is None or plan.batch is None else _memory(plan, plan.memory, plan.batch),
        "compute": None if plan.compute is None else asdict(plan.compute),
        "rollout": None if plan.rollout is None else asdict(plan.rollout),
        "shares_of_a_step": plan.shares,
        "findings": [asdict(finding) for finding in plan.findings],
    }


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "gpu": machine.device.kind,
        "nodes": machine.nodes,
        "gpus_per_node": machine.per_node,
        "rollout_nodes": machine.rollout_nodes,
        "trainer_ranks": machine.ranks,
        "colocated": machine.colocated,
        "device_bytes": machine.device.memory,
        "host_bytes_per_node": machine.host_memory,
    }


def _layout(plan: Plan, layout: Layout, with_ranks: bool) -> dict[str, Any]:
    arch = plan.recipe.arch
    found: dict[str, Any] = {
        **asdict(layout),
        "data": layout.data,
        "expert_data": layout.expert_data,
        "stage_layers": layout.stage_sizes(arch.num_hidden_layers),
        "groups": [asdict(span) for span in spans(layout, plan.machine.domain)],
    }
    if with_ranks:
        found["ranks"] = [asdict(at) for at in rank_table(layout)]
    return found


def _memory(plan: Plan, stages: list[StageMemory], batch: BatchPlan) -> dict[str, Any]:
    arch = plan.recipe.arch
    return {
        "stages": [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "dense_parameters": stage.dense_parameters,
                "expert_parameters": stage.expert_parameters,
                "bytes": {**stage.exact, **stage.estimated},
                "counted": list(stage.exact),
                "static_bytes": stage.static_bytes,
                "peak_bytes": stage.peak_bytes,
                "largest": stage.largest[0],
            }
            for stage in stages
        ],
        "moments": [asdict(moment) for moment in resources.moments(plan.recipe, plan.machine, stages, plan.rollout)],
        "device_bytes": plan.machine.device.memory,
        "host_bytes_per_node": resources.host_bytes(plan.recipe, arch, plan.machine, batch, stages),
        "disk_bytes": resources.disk_bytes(plan.recipe, arch, batch),
    }
