"""Rules of the trainer's parallel layout, and where its groups lie on the nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.trainer_section import TrainerSection
from gspo_megatron.parallel import Coordinates, Layout, layout_of, powers_of_two
from gspo_megatron.plan.rules import context_exchange
from gspo_megatron.plan.units import value_text
from gspo_megatron.types import Finding


@dataclass(frozen=True, slots=True)
class Span:
    """Where the ranks of one kind of group lie on the nodes."""

    name: str
    """Kind of group: `tensor`, `context`, `expert`, ..."""
    size: int
    """Ranks per group."""
    reach: int
    """Consecutive ranks from the first to the last member."""
    inside_node: bool
    """Whether every group of this kind stays within one node."""


def spans(layout: Layout, per_node: int) -> list[Span]:
    """Return the span of every kind of group. Ranks fill one node after the other."""
    inner, experts = layout.tensor * layout.context, layout.expert * layout.expert_tensor
    stage = layout.world // layout.pipeline
    reaches = [
        ("tensor", layout.tensor, layout.tensor),
        ("context", layout.context, inner if layout.context > 1 else 1),
        ("data", layout.data, stage if layout.data > 1 else 1),
        ("expert_tensor", layout.expert_tensor, layout.expert_tensor),
        ("expert", layout.expert, experts if layout.expert > 1 else 1),
        ("expert_data", layout.expert_data, stage if layout.expert_data > 1 else 1),
        ("pipeline", layout.pipeline, layout.world if layout.pipeline > 1 else 1),
    ]
    # Aligned blocks stay inside a node if their size divides it.
    return [Span(name, size, reach, reach == 1 or per_node % reach == 0) for name, size, reach in reaches]


def rank_table(layout: Layout) -> list[Coordinates]:
    """Return the coordinates of every rank."""
    return [layout.coordinates(rank) for rank in range(layout.world)]


def findings(trainer: TrainerSection, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Find everything that prevents the layout, and what makes it slow."""
    errors = [*_grid(trainer, machine.ranks), *_model_cuts(trainer, arch), *_pipeline(trainer, arch)]
    errors += [*_dynamic(trainer), *context_exchange.findings(trainer, arch)]
    yield from errors
    if not errors:
        yield from _nodes(layout_of(trainer, machine.ranks), machine)


def _error(code: str, key: str, message: str, fix: str) -> Finding:
    return Finding(code, "error", f"trainer.{key}", message, fix)


def _grid(trainer: TrainerSection, ranks: int) -> Iterator[Finding]:
    """Check the two products that must divide the number of ranks."""
    tensor, pipeline, context = trainer.tensor_parallel, trainer.pipeline_parallel, trainer.context_parallel
    inner = tensor * pipeline * context
    if ranks % inner:
        yield _error(
            "world-not-divisible", _largest(trainer, ("tensor_parallel", "pipeline_parallel", "context_parallel")),
            f"{ranks} ranks are not a multiple of TP {tensor} * PP {pipeline} * CP {context} = {inner}",
            f"choose sizes whose product divides {ranks}, or {_next_multiple(ranks, inner)} ranks",
        )  # fmt: skip
        return
    expert, expert_tensor = trainer.expert_parallel, trainer.expert_tensor_parallel
    outer = expert * expert_tensor * pipeline
    if ranks % outer:
        yield _error(
            "experts-not-divisible", _largest(trainer, ("expert_parallel", "expert_tensor_parallel")),
            f"{ranks} ranks are not a multiple of EP {expert} * ETP {expert_tensor} * PP {pipeline} = {outer}",
            f"choose EP * ETP as a divisor of {ranks // pipeline}, the ranks of one stage",
        )  # fmt: skip
        return
    data, group = ranks // inner, max(1, expert * expert_tensor // (tensor * context))
    if data % group:
        yield _error(
            "expert-group-splits-data", "expert_parallel",
            f"EP * ETP = {expert * expert_tensor} ranks span {group} data-parallel ranks, which do not divide the "
            f"{data} there are: micro-batches cannot be balanced over them",
            f"choose EP * ETP as a multiple of TP * CP = {tensor * context} that divides {ranks // pipeline}",
        )  # fmt: skip


def _dynamic(trainer: TrainerSection) -> Iterator[Finding]:
    """Check what packs that are shared by 1, 2, 4, ... context-parallel ranks ask for."""
    if not trainer.dynamic_context_parallel:
        return
    ranks = trainer.context_parallel
    if ranks == 1 or ranks & (ranks - 1):
        yield _error(
            "dynamic-context-size", "context_parallel",
            f"dynamic_context_parallel=true shares packs between 1, 2, 4, ... of the ranks, and context_parallel is "
            f"{ranks}",
            "choose a power of two above 1, or set dynamic_context_parallel=false",
        )  # fmt: skip
        return
    if trainer.micro_batch_tokens % ranks:
        yield _error(
            "dynamic-context-tokens", "micro_batch_tokens",
            f"{trainer.micro_batch_tokens} is not a multiple of context_parallel={ranks}, and with "
            "dynamic_context_parallel=true each rank has its own limit",
            f"set it to {_next_multiple(trainer.micro_batch_tokens, ranks)}",
        )  # fmt: skip
    experts = trainer.expert_parallel * trainer.expert_tensor_parallel
    shared = [trainer.tensor_parallel * size for size in powers_of_two(ranks)]
    if any(size % experts and experts % size for size in shared):
        yield _error(
            "expert-group-splits-context", "expert_parallel",
            f"EP * ETP = {experts} ranks and the {', '.join(map(str, shared))} ranks that may share a pack are no "
            "multiples of each other: ranks that wait for each other would not agree on what has a gradient",
            "choose EP * ETP as a power of two, or as a multiple of TP * CP",
        )  # fmt: skip
    if trainer.aux_loss_coefficient:
        yield _error(
            "dynamic-context-auxiliary-loss", "aux_loss_coefficient",
            f"{trainer.aux_loss_coefficient:g} balances experts over all context-parallel ranks as if they had equally "
            "many tokens, which they have not with dynamic_context_parallel=true",
            "set it to 0, or dynamic_context_parallel=false",
        )  # fmt: skip


def _largest(trainer: TrainerSection, keys: tuple[str, ...]) -> str:
    return max(keys, key=lambda key: getattr(trainer, key))


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _model_cuts(trainer: TrainerSection, arch: Architecture) -> Iterator[Finding]:
    """Check what tensor- and expert-parallel sizes must divide."""
    cuts = [
        ("heads-not-divisible", "tensor_parallel", arch.num_attention_heads, "query heads"),
        ("vocabulary-not-divisible", "tensor_parallel", arch.vocab_size, "rows of the vocabulary"),
    ]
    if arch.num_experts:
        cuts.append(("experts-per-rank", "expert_parallel", arch.num_experts, "experts"))
        cuts.append(("expert-width", "expert_tensor_parallel", arch.moe_intermediate_size, "columns of one expert"))
    else:
        cuts.append(("dense-width", "tensor_parallel", arch.intermediate_size, "columns of the feed-forward layer"))
    for code, key, whole, what in cuts:
        size = getattr(trainer, key)
        if whole % size:
            options = ", ".join(str(n) for n in range(1, min(whole, 129)) if whole % n == 0)
            yield _error(code, key, f"{whole} {what} do not divide by {key}={size}", f"choose one of {options}")
    tensor, groups = trainer.tensor_parallel, arch.num_key_value_heads
    if groups % tensor and tensor % groups:
        yield _error(
            "kv-groups-not-divisible", "tensor_parallel",
            f"{groups} key-value heads are neither a multiple nor a divisor of tensor_parallel={tensor}",
            f"choose a divisor or a multiple of {groups} that divides {arch.num_attention_heads} query heads",
        )  # fmt: skip
    if not arch.num_experts:
        for key in ("expert_parallel", "expert_tensor_parallel"):
            if getattr(trainer, key) > 1:
                yield _error(
                    "experts-of-a-dense-model", key,
                    f"{getattr(trainer, key)} ranks share experts, but the model has no experts", f"set {key}=1",
                )  # fmt: skip


def _pipeline(trainer: TrainerSection, arch: Architecture) -> Iterator[Finding]:
    """Check pipeline stages and their layers."""
    stages, layers = trainer.pipeline_parallel, arch.num_hidden_layers
    uneven = [key for key in ("first_stage_layers", "last_stage_layers") if getattr(trainer, key) is not None]
    if stages == 1:
        for key in [*uneven, *(["virtual_pipeline"] if trainer.virtual_pipeline else [])]:
            yield _error(
                "pipeline-key-without-stages", key,
                f"{getattr(trainer, key)} with pipeline_parallel=1, where it "
                "has no effect",
                f"remove {key}, or set pipeline_parallel above 1",
            )  # fmt: skip
        return
    if stages > layers:
        yield _error(
            "layers-not-divisible", "pipeline_parallel", f"{stages} stages for {layers} layers leave stages empty",
            f"set it to at most {layers}",
        )  # fmt: skip
        return
    try:
        Layout(
            stages, pipeline=stages, virtual=trainer.virtual_pipeline or 1,
            first_stage_layers=trainer.first_stage_layers, last_stage_layers=trainer.last_stage_layers,
        ).stage_sizes(layers)  # fmt: skip
    except ValueError as refusal:
        message, _, fix = str(refusal).partition("; ")
        if "virtual_pipeline" in message:
            yield _error("chunks-not-divisible", "virtual_pipeline", message, fix)
        else:
            yield _error(
                "layers-not-divisible", uneven[0] if uneven else "pipeline_parallel", message, _suggest(stages, layers)
            )


def _suggest(stages: int, layers: int) -> str:
    ends = even_ends(stages, layers)
    if ends is None:
        return f"choose pipeline_parallel as a divisor of {layers}"
    return f"set first_stage_layers={value_text(ends[0])} and last_stage_layers={value_text(ends[1])}"


def even_ends(stages: int, layers: int) -> tuple[int | None, int | None] | None:
    """Return layers of the first and of the last stage so that the stages between them are equal.

    (None, None) if all stages are equal; None if there is no solution. Solutions with lighter ends are preferred,
    because the ends also hold embedding and head.
    """
    if layers % stages == 0:
        return None, None
    even = -(-layers // stages)
    for middle in (even, even + 1, even - 1):
        ends = layers - middle * (stages - 2)
        if stages > 1 and 2 <= ends <= 2 * middle + 2:
            return ends - ends // 2, ends // 2
    return None


def _nodes(layout: Layout, machine: Machine) -> Iterator[Finding]:
    """Find groups that communicate in every layer and cross nodes."""
    if machine.is_cpu:
        return
    per_node = machine.domain
    for span in spans(layout, per_node):
        if span.inside_node or span.name not in ("tensor", "expert_tensor", "expert"):
            continue
        key = f"trainer.{span.name}_parallel"
        if span.name == "expert":
            yield Finding(
                "experts-cross-nodes", "info", key,
                f"EP {span.size} spans {span.reach} ranks, a node has {per_node}: tokens reach their experts over "
                f"the network, {machine.device.network / 1e9:.0f} GB/s per GPU instead of "
                f"{machine.device.node_link / 1e9:.0f}",
                f"keep EP * ETP at {per_node} or less to stay inside a node, with more weights per GPU; or, where "
                "DeepEP or HybridEP is installed, set trainer.megatron.moe_token_dispatcher_type=flex",
            )  # fmt: skip
        else:
            yield Finding(
                "tensor-crosses-nodes", "warning", key,
                f"{span.size} ranks exchange activations in every layer, but a node has {per_node} GPUs",
                f"set it to a divisor of {per_node}",
            )  # fmt: skip
