"""Rules of `rollout.weight_dtype`: servers that hold fp8, and an objective that reads their log-probs."""

from __future__ import annotations

from collections.abc import Iterator

from gspo_megatron.cluster.machines import BLACKWELL, HOPPER, Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.vllm_layout import ServerLayout, server_parameters
from gspo_megatron.models.weight_format import form_of
from gspo_megatron.types import Finding

KEY = "rollout.weight_dtype"
LEAST_BOUND = 3.0
"""Smallest `weight_update.canary_bound` with fp8, nats.

Source: the largest difference of bfloat16 (0.3) times the ratio of the roundings (9); transport/NOTES.md has both.
"""
OTHER_EXPERTS = ("batched_triton",)
"""Values of `rollout.vllm.moe_backend` that vllm 0.32 has for weights that are not quantised only.

Source: `map_fp8_backend` of its `fused_moe/oracle/fp8.py`.
"""


def findings(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Check what vLLM and the transfer need, and what the rounding does to the objective."""
    if recipe.rollout.weight_dtype is None:
        return
    yield from _device(recipe, machine)
    yield from _blocks(recipe, arch)
    backend = recipe.rollout.vllm.given().get("moe_backend")
    if backend in OTHER_EXPERTS:
        yield Finding(
            "server-refuses", "error", "rollout.vllm.moe_backend",
            f"{backend} takes no experts in fp8 ({KEY}=fp8)", "remove it",
        )  # fmt: skip
    bound = recipe.weight_update.canary_bound
    if bound < LEAST_BOUND:
        yield Finding(
            "canary-below-fp8", "error", "weight_update.canary_bound",
            f"{bound:g} nats are within the rounding of fp8 ({KEY}=fp8), so right weights would be refused",
            f"set it to {LEAST_BOUND:g}",
        )  # fmt: skip
    yield from _objective(recipe)


def _device(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    kind = machine.device.kind
    if machine.is_cpu:
        yield Finding(
            "fp8-needs-gpu", "error", KEY, "vLLM has no kernels for blocks of fp8 on CPUs without AMX, and none was "
            "tried on others", "remove it, or set placement.gpu",
        )  # fmt: skip
    elif kind not in (*HOPPER, *BLACKWELL, "gpu"):
        yield Finding(
            "fp8-needs-gpu", "error", KEY, f"{kind.upper()} has no arithmetic in fp8",
            f"remove it, or take one of {', '.join((*HOPPER, *BLACKWELL))}",
        )  # fmt: skip
    if recipe.model.dtype != "bfloat16":
        yield Finding(
            "fp8-type", "error", KEY, f"vLLM computes with fp8 weights in bfloat16, not in {recipe.model.dtype}",
            "set model.dtype=bfloat16",
        )  # fmt: skip


def _blocks(recipe: Recipe, arch: Architecture) -> Iterator[Finding]:
    """Hold a layer as every rank of a server does. Where it cannot be cut at all, another rule says so."""
    rollout = recipe.rollout
    layout = ServerLayout(rollout.tensor_parallel, expert_parallel=rollout.expert_parallel)
    one = arch.model_copy(update={"num_hidden_layers": 1})
    try:
        held = [server_parameters(one, layout, rank) for rank in {0, layout.world - 1}]
    except ValueError:
        return
    try:
        for parameters in held:
            form_of(recipe).wanted(parameters)
    except ValueError as error:
        message, _, fix = str(error).partition("; ")
        whole = "experts" in message and not rollout.expert_parallel
        spread = ", or set rollout.expert_parallel=true" if whole else ""
        yield Finding("fp8-blocks", "error", "rollout.tensor_parallel", message, fix + spread)


def _objective(recipe: Recipe) -> Iterator[Finding]:
    """What the sampler reports is no longer what the trainer computes."""
    spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
    if spec.ratio_reference == "sampler":
        yield Finding(
            "sampler-rounds-weights", "warning", "objective.ratio_reference",
            f"sampler divides by log-probs of weights that are rounded to fp8 ({KEY}=fp8): the ratio is not 1 before "
            "the first update, and clips what has not moved",
            "use ratio_reference=recomputed with objective.correction=[tis]",
        )  # fmt: skip
    elif not spec.correction:
        yield Finding(
            "sampler-rounds-weights", "warning", KEY,
            "fp8 rounds the sampler's weights and activations, so its log-probs differ from the trainer's, and no "
            "correction is set",
            "set objective.correction to tis or icepop, and watch the mismatch metrics; or remove it",
        )  # fmt: skip
