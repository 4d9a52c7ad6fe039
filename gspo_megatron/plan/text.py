"""A plan for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from gspo_megatron.plan import flops, needs
from gspo_megatron.plan.layout import spans
from gspo_megatron.plan.memory import StageMemory
from gspo_megatron.plan.plan import Plan
from gspo_megatron.types import Finding

if TYPE_CHECKING:
    from rich.text import Text

BAR = 48
"""Characters that stand for the memory of one device."""
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
"""What the terms of a stage are drawn as: a word of their name, a letter, a colour."""
STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def print_plan(plan: Plan, with_ranks: bool = False) -> None:
    """Write the plan to standard output; colours where it is a terminal."""
    # Here, because it costs a tenth of a second that --json and a refused recipe need not pay.
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines(plan):
        console.print(line, markup=False)
    if with_ranks and plan.layout is not None:
        for line in _ranks(plan):
            console.print(line, markup=False)
    for finding in plan.findings:
        console.print(finding_line(finding), style=STYLES[finding.severity], markup=False)
    errors = sum(finding.severity == "error" for finding in plan.findings)
    warnings = sum(finding.severity == "warning" for finding in plan.findings)
    verdict = f"refused: {errors} error(s)" if errors else "fine" if not warnings else "would run"
    console.print(f"{verdict}, {warnings} warning(s)", style="bold red" if errors else "bold", markup=False)


def finding_line(finding: Finding) -> str:
    """One finding on one line."""
    return str(finding)


def lines(plan: Plan) -> Iterator[Text | str]:
    """Everything but the findings, line by line."""
    arch = plan.recipe.model.architecture
    assert arch is not None
    machine = plan.machine
    what = "CPU ranks" if machine.is_cpu else machine.device.kind.upper()
    shared = "trainer and servers share them" if not machine.rollout_nodes else f"{machine.rollout_nodes} for servers"
    yield f"{plan.recipe.run.name}: {machine.nodes} node(s) x {machine.per_node} {what}, {shared}"
    yield _row(
        "model",
        f"{flops.parameters(arch) / 1e9:,.4g} B parameters, {flops.active_parameters(arch) / 1e9:,.4g} B "
        "active, "
        f"{arch.num_hidden_layers} layers, native context {arch.max_position_embeddings:,}",
    )  # fmt: skip
    yield _row("objective", plan.objective)
    if plan.layout is not None:
        yield from _layout(plan)
    if plan.batch is not None:
        yield from _block("batch", plan.batch.words())
    if plan.memory is not None:
        yield from _memory(plan, plan.memory)
    if plan.rollout is not None:
        yield from _rollout(plan)
    if plan.compute is not None:
        yield from _compute(plan)
    yield ""


def _row(name: str, value: str) -> str:
    return f"{name:<11}{value}"


def _block(name: str, lines: list[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        yield _row(name if index == 0 else "", line)


def _layout(plan: Plan) -> Iterator[str]:
    layout, arch = plan.layout, plan.recipe.model.architecture
    assert layout is not None and arch is not None
    sizes = [f"{len(list(run))} x {size}" for size, run in groupby(layout.stage_sizes(arch.num_hidden_layers))]
    chunks = f", {layout.virtual} chunks each" if layout.virtual > 1 else ""
    outside = [
        f"{span.name} ({span.size})"
        for span in spans(layout, plan.machine.per_node)
        if span.size > 1 and not span.inside_node
    ]
    yield from _block(
        "layout",
        [
            f"{layout.world} ranks = TP {layout.tensor} x CP {layout.context} x DP {layout.data} x PP "
            f"{layout.pipeline}; "
            f"experts: EP {layout.expert} x ETP {layout.expert_tensor} x EDP {layout.expert_data} x PP "
            f"{layout.pipeline}",
            f"stages of layers: {', '.join(sizes)}{chunks}; "
            + (f"groups over the network: {', '.join(outside)}" if outside else "every group stays inside a node"),
        ],
    )


def _memory(plan: Plan, stages: list[StageMemory]) -> Iterator[Text | str]:
    from rich.text import Text

    device = plan.machine.device.memory
    yield _row("memory", f"one rank of each stage while it trains, of {device / 1e9:.1f} GB (counted + estimated)")
    for stage in _distinct(stages):
        bar = Text(f"{'':<11}stage {stage.stage:<3}|")
        drawn = 0
        for word, letter, colour in SEGMENTS:
            size = sum(n for name, n in {**stage.exact, **stage.estimated}.items() if word in name)
            width = min(round(size / device * BAR), BAR - drawn)
            bar.append(letter * width, style=colour)
            drawn += width
        bar.append("." * (BAR - drawn))
        name, size = stage.largest
        bar.append(f"| {stage.static_bytes / 1e9:.1f} + {(stage.peak_bytes - stage.static_bytes) / 1e9:.1f} = ")
        bar.append(f"{stage.peak_bytes / 1e9:.1f} GB; largest: {name} {size / 1e9:.1f}")
        yield bar
    yield _row("", ", ".join(f"{letter} {word}" for word, letter, _ in SEGMENTS))
    for moment in needs.moments(plan.recipe, plan.machine, stages, plan.rollout):
        yield _row("", f"{moment.name}: {moment.bytes / 1e9:.1f} GB, {moment.bytes / device:.0%}; {moment.largest}")
    arch, batch = plan.recipe.model.architecture, plan.batch
    assert arch is not None and batch is not None
    host = needs.host_bytes(plan.recipe, arch, plan.machine, batch, stages)
    if host:
        told = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in host.items())
        yield _row("host", f"{told}; of {plan.machine.host_memory / 1e9:.0f} GB a node")
    disk = needs.disk_bytes(plan.recipe, arch, batch)
    yield _row("disk", ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in disk.items()))


def _distinct(stages: list[StageMemory]) -> list[StageMemory]:
    """First, last, and the fullest in between."""
    if len(stages) <= 3:
        return stages
    return [stages[0], max(stages[1:-1], key=lambda stage: stage.peak_bytes), stages[-1]]


def _rollout(plan: Plan) -> Iterator[str]:
    servers, rollout = plan.rollout, plan.recipe.rollout
    assert servers is not None
    yield from _block(
        "servers",
        [
            f"{servers.servers} x {servers.devices_per_server} {'process' if plan.machine.is_cpu else 'GPU'}(s), on "
            "each "
            f"{servers.weight_bytes / 1e9:.1f} GB of weights and {servers.kv_room / 1e9:.1f} GB for KV",
            f"KV of a token {servers.kv_bytes_per_token:,} bytes; of an answer of {rollout.max_answer_tokens:,} tokens "
            f"{servers.answer_bytes / 1e9:.2f} GB: {servers.answers_at_limit} fit a server, "
            f"{servers.answers_at_mean} of "
            "mean length",
            f"about {servers.tokens_per_second:,.0f} tokens/s a server with {servers.concurrency} answers at a "
            "time; the "
            f"longest answers alone take the last {servers.tail_seconds:,.0f} s",
        ],
    )


def _compute(plan: Plan) -> Iterator[str]:
    work, batch = plan.compute, plan.batch
    assert work is not None and batch is not None
    parts = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in work.seconds.items())
    yield from _block(
        "compute",
        [
            f"{work.linear_flops_per_token / 1e9:,.4g} + {work.quadratic_flops_per_token / 1e9:,.4g} GFLOP a token and "
            f"forward pass; attention is {work.attention_share_at_mean:.0%} of it at the mean length, "
            f"{work.attention_share_at_limit:.0%} at the limit",
            f"the trainer spends {work.forward_equivalents:.1f} forward passes a token: "
            f"{work.flops_per_step / 1e15:,.4g} PFLOP a step",
            f"a step takes about {work.seconds_per_step:,.0f} s ({parts}); the longest part is {work.bottleneck}",
            f"{work.tokens_per_device_second:,.1f} tokens a GPU-second; {plan.recipe.trainer.max_steps} steps: "
            f"{work.hours:,.1f} h, {work.device_hours:,.0f} GPU-hours",
        ],
    )


def _ranks(plan: Plan) -> Iterator[str]:
    layout = plan.layout
    assert layout is not None
    yield "rank  tp  cp  dp  pp | etp  ep edp"
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        yield (
            f"{rank:>4} {at.tensor:>3} {at.context:>3} {at.data:>3} {at.pipeline:>3} | "
            f"{at.expert_tensor:>3} {at.expert:>3} {at.expert_data:>3}"
        )
