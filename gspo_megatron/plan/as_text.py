"""Print a plan to a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import StageMemory
from gspo_megatron.plan.estimate.passes import passes_of
from gspo_megatron.plan.estimate.rollout import RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.plan.rules import resources
from gspo_megatron.plan.rules.layout import rank_table, spans
from gspo_megatron.plan.run_plan import Plan
from gspo_megatron.plan.units import between, count, many, seconds, si, size

if TYPE_CHECKING:
    from rich.text import Text

BAR = 48
"""Characters of a full bar: the memory of one device."""
SEGMENTS = (
    ("weights", "W", "blue"),
    ("gradients", "G", "cyan"),
    ("optimizer", "O", "magenta"),
    ("activations", "A", "green"),
    ("layer", "L", "green"),
    ("head", "H", "yellow"),
    ("slack", "F", "white"),
    ("process", "P", "white"),
    ("server", "S", "white"),
)
"""How the terms of a stage are drawn: a word of the term's name, a letter, a colour."""
EQUAL, CLIPPED = 0.4, 0.15
"""Shares that the plan assumes, as `tools/bench_step_cost.py` does: of all responses those in groups of equal rewards;
of the others those that are clipped after the first mini-batch."""
HINT = "other machines: --nodes N --gpu KIND; other layouts: --search; a key: --explain KEY; change: key=value"
WORTH_SAYING = 0.1
"""Share of a step that an info is about, from which the verdict says so."""
STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def print_plan(plan: Plan, with_ranks: bool = False) -> None:
    """Write the plan to standard output, with colours on a terminal."""
    # Imported here: it costs a tenth of a second, which --json and a refused recipe do not need.
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines(plan):
        console.print(line, markup=False)
    if with_ranks and plan.layout is not None:
        for line in _ranks(plan.layout):
            console.print(line, markup=False)
    for finding in plan.findings:
        console.print(str(finding), style=STYLES[finding.severity], markup=False)
    errors = sum(finding.severity == "error" for finding in plan.findings)
    warnings = sum(finding.severity == "warning" for finding in plan.findings)
    verdict = f"refused: {many(errors, 'error')}" if errors else "would run" if warnings else "fine"
    said = [f"; {code} is about {share:.0%} of a step" for code, share in plan.shares.items() if share >= WORTH_SAYING]
    better = "".join(said)
    console.print(
        f"{verdict}, {many(warnings, 'warning')}{better}", style="bold red" if errors else "bold", markup=False
    )
    console.print(HINT, style="dim", markup=False)


def lines(plan: Plan) -> Iterator[Text | str]:
    """Yield the lines of the plan, without its findings."""
    arch, machine = plan.recipe.arch, plan.machine
    what = "CPU ranks" if machine.is_cpu else machine.device.kind.upper()
    shared = (
        f"{machine.rollout_nodes} of them for servers" if machine.rollout_nodes else "shared by trainer and servers"
    )
    yield f"{plan.recipe.run.name}: {many(machine.nodes, 'node')} x {machine.per_node} {what}, {shared}"
    total, active = count(flops.parameters(arch)), count(flops.active_parameters(arch))
    native = f"native context {arch.max_position_embeddings:,}"
    yield _row("model", f"{total} parameters, {active} active, {arch.num_hidden_layers} layers, {native}")
    yield _row("objective", plan.objective)
    yield _row("reward", plan.recipe.reward.describe())
    if plan.recipe.teacher is not None:
        yield _row("teacher", plan.recipe.teacher.describe())
    yield _row("lr", plan.recipe.optimizer.describe(plan.recipe.total_updates))
    if plan.layout is not None:
        yield from _layout(plan, plan.layout)
    if plan.batch is not None:
        yield from _block("batch", plan.batch.words())
    if plan.memory is not None and plan.batch is not None:
        yield from _memory(plan, plan.memory)
        yield from _storage(plan, plan.memory, plan.batch)
    if plan.rollout is not None:
        yield from _rollout(plan, plan.rollout)
    if plan.compute is not None:
        yield from _compute(plan, plan.compute)
    yield ""


def _row(name: str, value: str) -> str:
    return f"{name:<11}{value}"


def _block(name: str, lines: list[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        yield _row(name if index == 0 else "", line)


def _layout(plan: Plan, layout: Layout) -> Iterator[str]:
    arch = plan.recipe.arch
    stages = ", ".join(
        f"{len(list(run))} x {length}" for length, run in groupby(layout.stage_sizes(arch.num_hidden_layers))
    )
    chunks = f" in {layout.virtual} chunks each" if layout.virtual > 1 else ""
    outside = [
        f"{span.name} {span.size}"
        for span in spans(layout, plan.machine.domain)
        if span.size > 1 and not span.inside_node
    ]
    reach = f"over the network: {', '.join(outside)}" if outside else "every group stays inside a node"
    yield from _block(
        "layout",
        [
            f"{many(layout.world, 'rank')} = TP {layout.tensor} x CP {layout.context} x DP {layout.data} "
            f"x PP {layout.pipeline}",
            f"for the experts: ETP {layout.expert_tensor} x EP {layout.expert} x EDP {layout.expert_data} "
            f"x PP {layout.pipeline}",
            f"stages x layers: {stages}{chunks}; {reach}",
        ],
    )


def _memory(plan: Plan, stages: list[StageMemory]) -> Iterator[Text | str]:
    from rich.text import Text

    device = plan.machine.device.memory
    yield _row("memory", f"a rank of each stage while it trains, of {size(device)}: counted + estimated")
    for stage in _distinct(stages):
        bar, drawn = Text(f"{'':<11}stage {stage.stage:<3}|"), 0
        for word, letter, colour in SEGMENTS:
            held = sum(n for name, n in {**stage.exact, **stage.estimated}.items() if word in name)
            width = min(round(held / device * BAR), BAR - drawn)
            bar.append(letter * width, style=colour)
            drawn += width
        name, largest = stage.largest
        coming = stage.peak_bytes - stage.static_bytes
        bar.append("." * (BAR - drawn))
        bar.append(f"| {size(stage.static_bytes)} + {size(coming)} = {size(stage.peak_bytes)}; ")
        bar.append(f"largest: {name}, {size(largest)}")
        yield bar
    yield _row("", ", ".join(f"{letter} {word}" for word, letter, _ in SEGMENTS))
    for moment in resources.moments(plan.recipe, plan.machine, stages, plan.rollout):
        yield _row("", f"{moment.name}: {size(moment.bytes)}, {moment.bytes / device:.0%}; largest: {moment.largest}")


def _distinct(stages: list[StageMemory]) -> list[StageMemory]:
    """Return the first stage, the last stage and the fullest one between them."""
    if len(stages) <= 3:
        return stages
    return [stages[0], max(stages[1:-1], key=lambda stage: stage.peak_bytes), stages[-1]]


def _storage(plan: Plan, stages: list[StageMemory], batch: BatchPlan) -> Iterator[str]:
    arch = plan.recipe.arch
    host = resources.host_bytes(plan.recipe, arch, plan.machine, batch, stages)
    if host:
        uses = ", ".join(f"{name} {size(held)}" for name, held in host.items())
        yield _row("host", f"{uses}; of {size(plan.machine.host_memory)} per node")
    disk = resources.disk_bytes(plan.recipe, arch, batch)
    yield _row("disk", ", ".join(f"{name} {size(held)}" for name, held in disk.items()))


def _rollout(plan: Plan, servers: RolloutPlan) -> Iterator[str]:
    rollout = plan.recipe.rollout
    each = "process" if plan.machine.is_cpu else "GPU" if servers.devices_per_server == 1 else "GPUs"
    yield from _block(
        "servers",
        [
            f"{servers.servers} x {servers.devices_per_server} {each}, on each {size(servers.weight_bytes)} of weights "
            f"and {size(servers.kv_room)} for KV",
            f"KV of a token {servers.kv_bytes_per_token:,} bytes; of a response of {rollout.max_answer_tokens:,} "
            f"tokens with its prompt {size(servers.answer_bytes)}: {servers.answers_at_limit} fit a server, "
            f"{servers.answers_at_mean} of mean length",
            f"about {servers.tokens_per_second:,.0f} tokens/s per server, {servers.concurrency} responses at a time; "
            f"the longest responses alone take the last {seconds(servers.tail_seconds)}",
        ],
    )


def _compute(plan: Plan, work: ComputePlan) -> Iterator[str]:
    parts = ", ".join(f"{name} {seconds(part)}" for name, part in work.seconds.items())
    costs = [between(work.hours, work.range, "h"), between(work.device_hours, work.range, "GPU-hours")]
    if work.price is not None:
        costs.append(f"{between(work.price, work.range, 'at')} {plan.recipe.placement.price:g} a GPU-hour")
    if work.kilowatt_hours is not None:
        costs.append(between(work.kilowatt_hours, work.range, "kWh"))
    yield from _block(
        "compute",
        [
            f"{si(work.linear_flops_per_token, 'FLOP')} + {si(work.quadratic_flops_per_token, 'FLOP')} of attention "
            f"per token and forward pass; attention is {work.attention_share_at_mean:.0%} over mixed "
            f"lengths, {work.attention_share_at_limit:.0%} at the limit",
            f"the trainer spends {work.forward_equivalents:.1f} forward passes per token, "
            f"{si(work.flops_per_step, 'FLOP')} per step",
            *_left_out(plan.recipe, work),
            f"a step takes {between(work.seconds_per_step, work.range, 's')}, of which in the middle {parts}; "
            f"longest: {work.bottleneck}",
            f"about {work.tokens_per_device_second:,.1f} tokens per GPU-second; {plan.recipe.trainer.max_steps} steps: "
            f"{', '.join(costs)}",
        ],
    )


def _left_out(recipe: Recipe, work: ComputePlan) -> Iterator[str]:
    """What `trainer.skip_zero_gradients` makes of it, with what is assumed of the rewards."""
    if recipe.skips_zero_gradients:
        most = passes_of(recipe, work.forward_equivalents, 1.0, 0.0)
        usual = passes_of(recipe, work.forward_equivalents, 1 - EQUAL, CLIPPED)
        clipped = f" and {CLIPPED:.0%} of the others are clipped" if usual.clipped else ""
        yield (
            f"{most.total:.2f} without passes whose gradient is 0, {usual.total:.2f} if {EQUAL:.0%} have equal rewards "
            f"in their group{clipped}; the times assume none"
        )


def _ranks(layout: Layout) -> Iterator[str]:
    yield "rank  tp  cp  dp  pp | etp  ep edp"
    for rank, at in enumerate(rank_table(layout)):
        yield (
            f"{rank:>4} {at.tensor:>3} {at.context:>3} {at.data:>3} {at.pipeline:>3} | "
            f"{at.expert_tensor:>3} {at.expert:>3} {at.expert_data:>3}"
        )
