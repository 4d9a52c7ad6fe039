"""The vLLM servers: memory, number of responses that fit, decoding speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.cluster.placement import server_nodes, span_findings
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import architecture_of
from gspo_megatron.models.vllm_engine import kv_cache_bytes
from gspo_megatron.models.weight_format import SCALE, WeightFormat, form_of
from gspo_megatron.plan.estimate import decode, flops
from gspo_megatron.plan.estimate.batch import PROMPT_SHARE, BatchPlan
from gspo_megatron.plan.estimate.padded_experts import padding_bytes
from gspo_megatron.plan.estimate.practice import OURS, Practice
from gspo_megatron.plan.estimate.server_steps import block_tokens, step_bytes
from gspo_megatron.types import Finding

SERVER_BYTES = 4_000_000_000
"""Bytes of a server per GPU outside weights and KV: context, graphs, NCCL, the largest prefill."""
CPU_SERVER_BYTES = 1_700_000_000
"""Bytes of a server without a GPU outside weights and KV."""
LATE_SHARE = 1 / 16
"""Responses that decode while only the longest are left, as a share of all that a server samples."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one server samples its share of some responses."""

    concurrency: int
    """Responses at a time: limited by memory, by the recipe and by their number."""
    step_seconds: float
    """Time of a decoding step at this concurrency."""
    tail_seconds: float
    """Time at the end in which only the longest responses decode."""
    seconds: float
    """Whole time: prompts, responses and tail."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """The servers of a run."""

    servers: int
    """Number of vLLM servers."""
    devices_per_server: int
    """GPUs of one server."""
    weight_bytes: int
    """Bytes of weights on one GPU, replicated parts included."""
    kv_bytes_per_token: int
    """Bytes of keys and values of one token, over all layers and GPUs, without replication."""
    kv_bytes_per_token_per_device: int
    """Bytes of keys and values of one token on one GPU."""
    kv_room: int
    """Bytes for the KV cache on one GPU."""
    answer_bytes: int
    """KV bytes of one response of the longest length with its prompt, over all GPUs."""
    answers_at_limit: int
    """Responses of the longest length that one server holds at one time."""
    answers_at_mean: int
    """Responses that one server holds at one time, at the length that a token of them sees on average."""
    concurrency: int
    """Responses that one server decodes at a time: limited by memory, by the recipe and by the batch."""
    tokens_per_second: float
    """Response tokens per second of one server at this concurrency."""
    seconds: float
    """Time of one rollout batch, seconds."""
    tail_seconds: float
    """Part of that time in which only the longest responses decode."""
    evaluation_seconds: float
    """Time of the responses of one evaluation, seconds; 0 = no held-out problems."""


def weight_bytes(arch: Architecture, tensor: int, pipeline: int, form: WeightFormat) -> int:
    """Return the bytes of weights on one GPU of a server.

    Norms and router are replicated, and each GPU holds at least one key-value head.
    """
    copied, grouped, cut = _kinds(flops.as_key(arch), form)
    whole = copied + -(-grouped // min(tensor, arch.num_key_value_heads)) + -(-cut // tensor)
    return -(-whole // pipeline)


@lru_cache(maxsize=32)
def _kinds(key: str, form: WeightFormat) -> tuple[int, int, int]:
    """Count the bytes that are replicated, that are split by key-value heads, and that are split evenly."""
    copied = grouped = cut = 0
    for name, shape in form.shapes(architecture_of(json.loads(key))).items():
        size = math.prod(shape) * form.item_bytes(name)
        if len(shape) == 1 or name.endswith("mlp.gate.weight"):
            copied += size
        elif name.removesuffix(SCALE).endswith(("k_proj.weight", "v_proj.weight")):
            grouped += size
        else:
            cut += size
    return copied, grouped, cut


def plan_rollout(
    recipe: Recipe, arch: Architecture, batch: BatchPlan, machine: Machine, practice: Practice = OURS
) -> RolloutPlan:
    """Estimate memory and speed of the servers."""
    rollout = recipe.rollout
    devices = rollout.tensor_parallel * rollout.pipeline_parallel
    weights = weight_bytes(arch, rollout.tensor_parallel, rollout.pipeline_parallel, form_of(recipe))
    per_token = decode.kv_bytes(recipe, arch)
    per_device = -(-per_token // (decode.kv_shards(recipe, arch) * rollout.pipeline_parallel))
    if machine.is_cpu:
        room = kv_cache_bytes(recipe, arch) // devices
    else:
        room = int(machine.device.memory * rollout.gpu_memory_fraction) - weights - SERVER_BYTES
        room = max(0, room - padding_bytes(recipe, arch, machine) - step_bytes(recipe, arch, machine))
    blocks = block_tokens(recipe, machine)
    room = room if blocks is None else min(room, blocks * per_device)
    longest = rollout.max_sequence_tokens
    held = int(room / (per_device * _lengths(recipe, practice)[1]))
    wanted = batch.sequences / (1 - practice.rates.dropped_groups if samples_again(recipe) else 1)
    training = _sampling(recipe, arch, machine, held, wanted, recipe.batch.answers, practice)
    each = recipe.evaluation.answers
    held_out = recipe.planned_evaluation * each
    evaluation = _sampling(recipe, arch, machine, held, held_out, each, practice).seconds if held_out else 0.0
    return RolloutPlan(
        servers=rollout.servers,
        devices_per_server=devices,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_bytes_per_token_per_device=per_device,
        kv_room=room,
        answer_bytes=per_token * longest,
        answers_at_limit=room // (per_device * longest),
        answers_at_mean=held,
        concurrency=training.concurrency,
        tokens_per_second=training.concurrency / training.step_seconds,
        seconds=training.seconds,
        tail_seconds=training.tail_seconds,
        evaluation_seconds=evaluation,
    )


def _lengths(recipe: Recipe, practice: Practice) -> tuple[float, float]:
    """Return the tokens of a mean response, and the tokens that one of its tokens sees on average."""
    rollout = recipe.rollout
    answer = min(rollout.expected_answer_tokens or rollout.max_answer_tokens / 2, rollout.max_answer_tokens)
    # A token of a response of length l sees half of it on average, and long ones have more tokens: E[l^2] / 2 E[l].
    spread = min(practice.rates.length_spread, rollout.max_answer_tokens / answer)
    return answer, rollout.max_prompt_tokens * PROMPT_SHARE + answer * spread / 2


def _sampling(
    recipe: Recipe, arch: Architecture, machine: Machine, held: int, responses: float, each: int, practice: Practice
) -> Sampling:
    """Estimate the time of some responses, which the servers share evenly. A larger concurrency is never slower.

    Args:
        held: responses that a server has memory for.
        responses: of all servers.
        each: responses of a prompt.
    """
    rollout = recipe.rollout
    answer, context = _lengths(recipe, practice)
    todo = math.ceil(responses / rollout.servers)
    concurrency = max(1, min(held, rollout.max_concurrency, todo))
    step = decode.step_seconds(recipe, arch, machine, concurrency, context, practice)
    # At the end only a few decode, up to the limit: the longest of all, however many are decoded at a time.
    most = rollout.max_answer_tokens
    beyond, few = most - answer, max(1.0, todo * LATE_SHARE)
    at_once = min(few, concurrency)
    tail = beyond * few / at_once * decode.step_seconds(recipe, arch, machine, at_once, most * 0.8, practice)
    # Both parts fall with the concurrency: what a step costs beside its responses is shared by more of them.
    volume = todo * max(0.0, answer - beyond * LATE_SHARE) / concurrency * step
    longest = most * decode.step_seconds(recipe, arch, machine, 1, most / 2, practice)
    # With a prefix cache a prompt is read once for all its responses.
    prompts = todo / (each if rollout.prefix_caching else 1)
    read = decode.prefill_seconds(recipe, arch, machine, prompts, practice)
    return Sampling(concurrency, step, tail, read + max(longest, volume + tail))


def samples_again(recipe: Recipe) -> bool:
    """Return whether groups without a difference in reward are replaced by further samples."""
    return recipe.objective.spec(recipe.rollout.max_answer_tokens).group_filter == "dynamic_sampling"


def findings(recipe: Recipe, arch: Architecture, machine: Machine, plan: RolloutPlan) -> Iterator[Finding]:
    """Servers that cannot be cut, that do not fit, or that leave GPUs idle."""
    yield from _cuts(recipe, arch)
    if machine.is_cpu:
        if recipe.rollout.expert_parallel:
            yield Finding(
                "server-cut", "error", "rollout.expert_parallel",
                "vllm 0.32's CPU kernel crashes on a token with an expert on another rank", "set it to false",
            )  # fmt: skip
        return
    nodes, span = machine.rollout_nodes or machine.nodes, server_nodes(recipe, machine.per_node)
    misfits = list(span_findings(recipe, nodes, machine.per_node, machine.rollout_nodes > 0))
    yield from misfits
    # A server that spans nodes has them for itself.
    devices = span * machine.per_node if span > 1 else plan.devices_per_server
    wanted, there = plan.servers * devices, machine.rollout_devices
    if wanted != there and not misfits:
        where = f"{machine.rollout_nodes} rollout node(s)" if machine.rollout_nodes else f"{machine.nodes} node(s)"
        most = max(1, there // devices)
        yield Finding(
            "servers-exceed-gpus" if wanted > there else "idle-rollout-gpus",
            "error" if wanted > there else "warning",
            "rollout.servers",
            f"{plan.servers} servers x {devices} GPUs = {wanted}, but {where} have {there}",
            f"set rollout.servers={most}"
            if most != plan.servers
            else f"choose rollout.tensor_parallel x rollout.pipeline_parallel as a divisor of {there}",
        )
    tensor, room = recipe.rollout.tensor_parallel, plan.devices_per_server // span if span > 1 else machine.per_node
    if room % tensor:
        yield Finding(
            "server-crosses-nodes", "warning", "rollout.tensor_parallel",
            f"{tensor} GPUs exchange activations in every layer, but a server has {room} of a node's "
            f"{machine.per_node}",
            f"set it to a divisor of {room}",
        )  # fmt: skip
    yield from _room(recipe, machine, plan)


def _cuts(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """What vLLM's tensor parallelism must divide."""
    tensor, groups = recipe.rollout.tensor_parallel, arch.num_key_value_heads
    if recipe.rollout.expert_parallel and not arch.num_experts:
        yield Finding(
            "server-cut", "error", "rollout.expert_parallel", "the model is dense: it has no experts to spread",
            "set it to false",
        )  # fmt: skip
        return
    width = arch.moe_intermediate_size if arch.num_experts else arch.intermediate_size
    spread = (
        (arch.num_experts, "experts")
        if recipe.rollout.expert_parallel
        else (width, "columns of the feed-forward layer")
    )
    for whole, what in ((arch.num_attention_heads, "query heads"), spread):
        if whole % tensor:
            yield Finding(
                "server-cut", "error", "rollout.tensor_parallel", f"{whole} {what} do not divide by {tensor}",
                "choose a divisor",
            )  # fmt: skip
    if groups % tensor and tensor % groups:
        yield Finding(
            "server-cut", "error", "rollout.tensor_parallel",
            f"{groups} key-value heads can be neither cut into {tensor} nor copied evenly",
            f"choose a divisor or multiple of {groups}",
        )  # fmt: skip
    if recipe.rollout.pipeline_parallel > arch.num_hidden_layers:
        yield Finding(
            "server-cut", "error", "rollout.pipeline_parallel",
            f"{recipe.rollout.pipeline_parallel} stages for {arch.num_hidden_layers} layers", "take fewer",
        )  # fmt: skip
    if tensor % recipe.rollout.decode_context_parallel:
        yield Finding(
            "server-cut", "error", "rollout.decode_context_parallel",
            f"{recipe.rollout.decode_context_parallel} does not divide tensor_parallel={tensor}; it regroups those "
            "ranks",
            "choose a divisor",
        )  # fmt: skip


def _room(recipe: Recipe, machine: Machine, plan: RolloutPlan) -> Iterator[Finding]:
    rollout = recipe.rollout
    if plan.kv_room == 0:
        allowed = machine.device.memory * rollout.gpu_memory_fraction
        yield Finding(
            "server-does-not-fit", "error", "rollout.tensor_parallel",
            f"{plan.weight_bytes / 1e9:.1f} GB of weights and {SERVER_BYTES / 1e9:.0f} GB of buffers do not fit the "
            f"{allowed / 1e9:.1f} GB of gpu_memory_fraction={rollout.gpu_memory_fraction:g}",
            "raise rollout.tensor_parallel or gpu_memory_fraction",
        )  # fmt: skip
    elif plan.answers_at_limit == 0:
        yield Finding(
            "answer-exceeds-kv", "error", "rollout.max_answer_tokens",
            f"the KV of one response of {rollout.max_answer_tokens} tokens takes {plan.answer_bytes / 1e9:.1f} GB; a "
            f"server of {plan.devices_per_server} GPU(s) has {plan.kv_room * plan.devices_per_server / 1e9:.1f} GB "
            "left for KV",
            "raise rollout.tensor_parallel or gpu_memory_fraction, or shorten the responses",
        )  # fmt: skip
    elif plan.answers_at_mean < rollout.max_concurrency // 4 and plan.answers_at_mean < recipe.batch.prompts:
        yield Finding(
            "kv-limits-concurrency", "info", "rollout.max_concurrency",
            f"a server holds about {plan.answers_at_mean} responses of mean length, less than "
            f"max_concurrency={rollout.max_concurrency}",
            "take more GPUs for rollout, or more GPUs per server, to decode more at a time",
        )  # fmt: skip
