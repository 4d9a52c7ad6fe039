"""Seconds of one decoding step of a vLLM server, and of the prompts."""

from __future__ import annotations

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.weight_format import form_of
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import PROMPT_SHARE
from gspo_megatron.plan.estimate.padded_experts import padded_share
from gspo_megatron.plan.estimate.practice import OURS, Practice, link_speed
from gspo_megatron.plan.estimate.server_steps import launch_seconds, prompt_tokens
from gspo_megatron.types import ITEM_BYTES

SUM_PER_RANK = 2e-6
"""Seconds of an all-reduce inside a node for each of its ranks: all read from all."""


def kv_shards(recipe: Recipe, arch: Architecture) -> int:
    """Return the GPUs that share the keys and values of a token: more tensor-parallel ranks than heads copy them."""
    rollout = recipe.rollout
    return min(rollout.tensor_parallel, arch.num_key_value_heads) * rollout.decode_context_parallel


def kv_bytes(recipe: Recipe, arch: Architecture) -> int:
    """Return the bytes of keys and values of a token over all layers, in the type that the servers keep them in."""
    chosen = str(recipe.rollout.vllm.given().get("kv_cache_dtype", "auto"))
    element = 1 if chosen.startswith("fp8") else ITEM_BYTES[recipe.model.dtype if chosen == "auto" else chosen]
    return flops.kv_bytes(arch, element)


def step_seconds(
    recipe: Recipe, arch: Architecture, machine: Machine, batch: float, context: float, practice: Practice = OURS
) -> float:
    """Return the seconds of one decoding step: reading weights and KV, or arithmetic, whichever takes longer.

    Matrices in fp8 are read as such; for their arithmetic nothing is gained here, because nobody has measured it.

    Args:
        batch: responses that are decoded at a time.
        context: tokens that one of them sees.
    """
    rollout, device, rates = recipe.rollout, machine.device, practice.rates
    tensor, stages = rollout.tensor_parallel, rollout.pipeline_parallel
    element = ITEM_BYTES[recipe.model.dtype]
    # Each stage works on a share of the batch, which reads only the experts that it selects.
    share = max(1.0, batch / stages)
    met = 1 - (1 - arch.num_experts_per_tok / arch.num_experts) ** share if arch.num_experts else 1.0
    chosen = arch.num_hidden_layers * arch.num_experts_per_tok * flops.expert_parameters(arch)
    padded = padded_share(recipe, arch, machine)
    experts = arch.num_hidden_layers * arch.num_experts * flops.expert_parameters(arch) * padded
    embedding = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size
    plain = arch.vocab_size * arch.hidden_size + arch.num_hidden_layers * arch.num_experts * arch.hidden_size
    matrices = flops.active_parameters(arch) - chosen - embedding - plain + experts * met
    weights = (matrices * form_of(recipe).matrix_bytes + plain * element) / tensor
    cache = share * context * kv_bytes(recipe, arch) / kv_shards(recipe, arch)
    linear = flops.linear_flops(arch) + (padded - 1) * flops.mixer_flops(arch)
    done = share * (linear + 2 * flops.quadratic_flops(arch) * context) / tensor
    read = (weights + cache) / (device.bandwidth * rates.server_share)
    busy = max(read, done / (device.matmul * rates.server_product_share))
    # Sums after attention and after the experts; ranks that share the KV also gather queries and scatter outputs.
    sums = 4 if rollout.decode_context_parallel > 1 else 2
    exchange = sums * arch.num_hidden_layers * _sum_seconds(arch, machine, tensor, share, element, practice)
    # Without a captured graph the host launches each kernel while the GPU computes; the slower of both counts.
    ready = max(busy + exchange, launch_seconds(recipe, arch, machine, share, rates))
    return ready + rates.step_seconds * stages + rates.request_seconds * batch


def _sum_seconds(
    arch: Architecture, machine: Machine, tensor: int, batch: float, element: int, practice: Practice
) -> float:
    """Return the seconds of the all-reduce after attention or the experts."""
    if tensor == 1 or machine.is_cpu:
        return 0.0
    states = 2 * batch * arch.hidden_size * element * (tensor - 1) / tensor
    if tensor > machine.domain:
        return practice.rates.far_sum_seconds + states / link_speed(machine, practice, inside=False)
    least = practice.rates.sum_seconds + SUM_PER_RANK * tensor
    return least + states / link_speed(machine, practice, inside=True)


def prefill_seconds(
    recipe: Recipe, arch: Architecture, machine: Machine, prompts: float, practice: Practice = OURS
) -> float:
    """Return the seconds in which a server reads so many prompts: arithmetic, or reading the weights once a step."""
    rollout, rates = recipe.rollout, practice.rates
    length = rollout.max_prompt_tokens * PROMPT_SHARE
    devices = rollout.tensor_parallel * rollout.pipeline_parallel
    padded = (padded_share(recipe, arch, machine) - 1) * flops.mixer_flops(arch)
    work = (flops.forward_flops(arch, length) + padded) / (machine.device.matmul * rates.server_product_share * devices)
    weights = flops.parameters(arch) * ITEM_BYTES[recipe.model.dtype] / devices
    read = weights / (machine.device.bandwidth * rates.server_share)
    return prompts * length * max(work, read / prompt_tokens(recipe, machine))
