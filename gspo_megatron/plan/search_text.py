"""Print what `--search` found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.estimate.calibration import TIME_RANGE
from gspo_megatron.plan.run_plan import make_plan
from gspo_megatron.plan.search import Candidate, Found, Least, Servers, search
from gspo_megatron.plan.suggest import apply, value_of
from gspo_megatron.plan.units import between, overrides_text

SHOWN = 8
"""Number of layouts and of server sizes that are printed."""


def print_search(recipe: Recipe, least: Least, as_json: bool) -> int:
    """Print the result. Returns 0 if a layout and a server size fit and the recipe with them would run, else 2."""
    found = search(recipe, least)
    first = found[0]
    fits = bool(first.layouts and (first.servers or first.machine.is_cpu))
    # The search sees layouts only: the rest of the recipe has rules of its own.
    planned = make_plan(apply(recipe, first.change)).findings if fits else ()
    said = [finding for finding in planned if finding.severity != "info"]
    refused = any(finding.severity == "error" for finding in said)
    if as_json:
        shown = [
            {
                "nodes": one.machine.nodes,
                "rollout_nodes": one.machine.rollout_nodes,
                "seconds_per_step": one.seconds if one.layouts and one.servers else None,
                "gpu_hours": _gpu_hours(recipe, one) if one.layouts and one.servers else None,
                "seconds_range": TIME_RANGE,
                "layouts": [asdict(layout) for layout in one.layouts],
                "servers": [asdict(servers) for servers in one.servers],
            }
            for one in found
        ]
        document = {"version": 2, "placements": shown, "findings": [asdict(finding) for finding in said]}
        print(json.dumps(document, indent=1))
    else:
        for line in _lines(recipe, found, least, refused):
            print(line)
        for finding in said:
            print(finding)
    return 0 if fits and not refused else 2


def _lines(recipe: Recipe, found: list[Found], least: Least, refused: bool) -> Iterator[str]:
    for one in found:
        yield from _placement(one, len(found))
    first = found[0]
    if first.layouts and first.servers:
        step, hours = between(first.seconds, TIME_RANGE, "s"), between(_gpu_hours(recipe, first), TIME_RANGE, "")
        said = f"the fastest step takes {step}"
        if least == "gpu-hours":
            said = f"the fewest GPU-hours for {recipe.trainer.max_steps} steps are {hours.strip()}, {step} a step"
        if refused:
            yield f"{said}, but the recipe is refused with it:"
            return
        yield f"{said}; as overrides:"
        yield overrides_text(_without_defaults(recipe, first.change))


def _gpu_hours(recipe: Recipe, one: Found) -> float:
    return one.gpu_seconds * recipe.trainer.max_steps / 3600


def _placement(one: Found, placements: int) -> Iterator[str]:
    machine, device = one.machine, one.machine.device
    where = f"{machine.ranks} trainer ranks on {machine.nodes - machine.rollout_nodes} node(s) x {machine.per_node}"
    where += f" {device.kind.upper()}"
    if placements > 1:
        shared = f"{machine.rollout_nodes} nodes for servers" if machine.rollout_nodes else "shared by servers"
        where += f", {shared}"
    if one.layouts:
        shown = min(SHOWN, len(one.layouts))
        yield f"{len(one.layouts)} layouts fit {where}; the first {shown}, fastest first:"
        sizes = f"{'TP':>3} {'CP':>3} {'PP':>3} {'VPP':>3} {'EP':>4} {'ETP':>3}"
        yield f"{sizes} {'tokens':>7} recompute  {'s/step':>7} {'GB':>6}  why"
    else:
        yield f"no layout fits {where}: take more nodes, a GPU with more memory, or shorter responses"
    for layout in one.layouts[:SHOWN]:
        yield _layout_row(layout)
    yield ""
    if not one.servers:
        yield f"no division of {machine.rollout_devices} GPUs into servers fits"
        yield ""
        return
    yield f"{len(one.servers)} ways to divide {machine.rollout_devices} GPUs into servers, fastest batch first:"
    yield f"{'servers':>7} {'TP':>3} {'DCP':>3} {'PP':>3} {'responses at limit':>21} {'tokens/s':>9} {'s/batch':>8}"
    for servers in one.servers[:SHOWN]:
        yield _server_row(servers)
    yield ""


def _layout_row(one: Candidate) -> str:
    keys = {key.rpartition(".")[2]: value for key, value in one.change.items()}
    mode = keys["recompute"] + (" +host" if keys["offload_activations"] else "")
    mode += f" {keys['cp_comm_type']}" if keys["cp_comm_type"] else ""
    return (
        f"{keys['tensor_parallel']:>3} {keys['context_parallel']:>3} {keys['pipeline_parallel']:>3} "
        f"{keys['virtual_pipeline'] or 1:>3} {keys['expert_parallel']:>4} {keys['expert_tensor_parallel']:>3} "
        f"{keys['micro_batch_tokens']:>7} {mode:<10} {one.seconds:>7,.0f} {one.peak_bytes / 1e9:>6.1f}  {one.why}"
    )


def _server_row(one: Servers) -> str:
    keys = {key.split(".")[1]: value for key, value in one.change.items()}
    return (
        f"{one.plan.servers:>7} {keys['tensor_parallel']:>3} {keys['decode_context_parallel']:>3} "
        f"{keys['pipeline_parallel']:>3} {one.plan.answers_at_limit:>21} "
        f"{one.plan.tokens_per_second * one.plan.servers:>9,.0f} {one.plan.seconds:>8,.0f}"
    )


def _without_defaults(recipe: Recipe, change: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the recipe says already."""
    return {key: value for key, value in change.items() if value != value_of(recipe, key)}
