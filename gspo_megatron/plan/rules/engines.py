"""Rules of `trainer.megatron` and `rollout.vllm`: what has no effect, and what other parts cannot follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gspo_megatron.cluster.machines import BLACKWELL, HOPPER, Machine
from gspo_megatron.config.engine_keys import ACT_ON_CPU
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.server_cuts import EXPERT_TILE
from gspo_megatron.plan.estimate.engine_effects import MEGATRON_EFFECTS, VLLM_EFFECTS, not_counted
from gspo_megatron.plan.estimate.padded_experts import UNPADDED, expert_widths, pads_experts
from gspo_megatron.plan.rules import context_exchange, server_start, server_weights
from gspo_megatron.plan.units import value_text
from gspo_megatron.types import Finding

FLASH_ATTENTION_GPUS = {3: HOPPER, 4: (*HOPPER, *BLACKWELL)}
"""GPUs for which a version of flash-attention has kernels. Source: its README; 2 runs on every GPU of the table."""
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads on a CPU. Source: vLLM 0.32's `v1/attention/backends/cpu_attn.py`."""
CPU_TILE = 32
"""The same for the hidden size of experts: `fused_moe/experts/cpu_moe.py`."""


def findings(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """Check every given argument beside the rest of the recipe."""
    megatron, vllm = recipe.trainer.megatron.given(), recipe.rollout.vllm.given()
    given = {f"trainer.megatron.{name}": value for name, value in megatron.items()}
    given |= {f"rollout.vllm.{name}": value for name, value in vllm.items()}
    if machine.is_cpu:
        given |= {"rollout.model_runner": recipe.rollout.model_runner} if recipe.rollout.model_runner else {}
        yield from _only_on_gpus(given)
        yield from _cpu_shapes(arch)
    yield from _inert(recipe, arch, given)
    yield from _trainer_layout(recipe, arch, megatron)
    yield from _flash_attention(machine, megatron)
    yield from server_start.findings(recipe, machine)
    yield from server_weights.findings(recipe, arch, machine)
    if str(vllm.get("kv_cache_dtype", "")).startswith("fp8"):
        yield from _rounded_keys(recipe)
    yield from _not_counted(megatron, vllm)
    if pads_experts(recipe, machine):
        yield from _padded_experts(recipe, arch, machine)


def _not_counted(megatron: dict[str, Any], vllm: dict[str, Any]) -> Iterator[Finding]:
    """Arguments that change times or memory in a way that the estimate does not know."""
    for section, effects, given in (
        ("trainer.megatron", MEGATRON_EFFECTS, megatron), ("rollout.vllm", VLLM_EFFECTS, vllm)
    ):  # fmt: skip
        if names := not_counted(effects, given):
            yield Finding(
                "engine-not-counted", "info", section,
                f"what {', '.join(names)} changes is not in the planned times and memory",
                "compare the seconds of the first steps with the plan's",
            )  # fmt: skip


def _cpu_shapes(arch: Architecture) -> Iterator[Finding]:
    """Shapes that vLLM's CPU kernels take."""
    if arch.head_dim not in CPU_HEADS:
        yield Finding(
            "cpu-head-size", "error", "model", f"head_dim={arch.head_dim}: vLLM's attention on CPUs has no such size",
            f"name a model with one of {', '.join(map(str, CPU_HEADS))}, or set placement.gpu",
        )  # fmt: skip
    if arch.num_experts and arch.hidden_size % CPU_TILE:
        yield Finding(
            "cpu-expert-size", "error", "model",
            f"hidden_size={arch.hidden_size} is no multiple of {CPU_TILE}, which vLLM's experts on CPUs want",
            "name a model with a multiple of it, or set placement.gpu",
        )  # fmt: skip


def _only_on_gpus(given: dict[str, Any]) -> Iterator[Finding]:
    if given.get(context_exchange.KIND) == "p2p":
        yield Finding(
            "engine-needs-gpu", "error", context_exchange.KIND,
            "p2p has no effect: the ring is Transformer Engine's, and the layers of a CPU gather keys and values",
            "remove it, or set placement.gpu",
        )  # fmt: skip
    for key, value in given.items():
        if key.rpartition(".")[2] not in ACT_ON_CPU:
            message = f"{value_text(value)} has no effect: the part that reads it runs on a GPU only"
            yield Finding("engine-needs-gpu", "error", key, message, "remove it, or set placement.gpu")


def _inert(recipe: Recipe, arch: Architecture, given: dict[str, Any]) -> Iterator[Finding]:
    """Arguments that another key makes ineffective."""
    trainer, megatron = recipe.trainer, recipe.trainer.megatron.given()
    flex = megatron.get("moe_token_dispatcher_type") == "flex"
    selective, overlap = trainer.recompute == "selective", megatron.get("overlap_grad_reduce")
    binds = recipe.rollout.vllm.given().get("numa_bind")
    needs = {
        "trainer.megatron.bucket_size": (overlap, "trainer.megatron.overlap_grad_reduce=true"),
        context_exchange.KIND: (trainer.context_parallel > 1, "trainer.context_parallel above 1"),
        context_exchange.SIZES: (
            megatron.get("cp_comm_type") == context_exchange.TWO_LEVELS,
            f"{context_exchange.KIND}={context_exchange.TWO_LEVELS}",
        ),
        "trainer.megatron.moe_flex_dispatcher_backend": (flex, "trainer.megatron.moe_token_dispatcher_type=flex"),
        "trainer.megatron.moe_flex_dispatcher_num_sms": (flex, "trainer.megatron.moe_token_dispatcher_type=flex"),
        "trainer.megatron.recompute_modules": (selective, "trainer.recompute=selective"),
        "rollout.vllm.numa_bind_cpus": (binds, "rollout.vllm.numa_bind=true"),
        "rollout.vllm.numa_bind_nodes": (binds, "rollout.vllm.numa_bind=true"),
        "rollout.vllm.sleep_mode_offload_cudagraph": (not recipe.placement.rollout_nodes, "placement.rollout_nodes=0"),
        "rollout.vllm.enable_nccl_comm_suspend": (not recipe.placement.rollout_nodes, "placement.rollout_nodes=0"),
    }  # fmt: skip
    for key, value in given.items():
        name = key.rpartition(".")[2]
        if key in needs and not needs[key][0]:
            yield Finding(
                "engine-inert", "error", key, f"{value_text(value)} has no effect without {needs[key][1]}",
                f"remove it, or set {needs[key][1].replace(' above ', ' > ')}",
            )  # fmt: skip
        if not arch.num_experts and name.startswith("moe_"):
            yield Finding(
                "engine-inert", "error", key, f"{value_text(value)} is of experts, and the model has none", "remove it"
            )


def _trainer_layout(recipe: Recipe, arch: Architecture, megatron: dict[str, Any]) -> Iterator[Finding]:
    trainer = recipe.trainer
    flex = megatron.get("moe_token_dispatcher_type") == "flex"
    if flex and arch.num_experts and trainer.expert_parallel * trainer.expert_tensor_parallel == 1:
        yield Finding(
            "engine-layout", "error", "trainer.megatron.moe_token_dispatcher_type",
            "flex sends tokens between expert-parallel ranks, and trainer.expert_parallel is 1", "remove it",
        )  # fmt: skip

    if megatron.get("use_te_activation_func") and megatron.get("bias_activation_fusion", True):
        yield Finding(
            "engine-layout", "error", "trainer.megatron.use_te_activation_func",
            "true is refused beside bias_activation_fusion, which is on",
            "set trainer.megatron.bias_activation_fusion=false, or remove it",
        )  # fmt: skip


def _flash_attention(machine: Machine, megatron: dict[str, Any]) -> Iterator[Finding]:
    version = megatron.get("flash_attention_version", 2)
    kinds = FLASH_ATTENTION_GPUS.get(version, (machine.device.kind,))
    if not machine.is_cpu and machine.device.kind != "gpu" and machine.device.kind not in kinds:
        yield Finding(
            "engine-gpu", "error", "trainer.megatron.flash_attention_version",
            f"version {version} has kernels for {', '.join(kinds)}, and none for {machine.device.kind}",
            "remove it: Transformer Engine then chooses one that runs",
        )  # fmt: skip


def _rounded_keys(recipe: Recipe) -> Iterator[Finding]:
    """Keys and values of eight bits: what the sampler reports is no longer what the trainer computes."""
    if recipe.objective.spec(recipe.rollout.max_answer_tokens).correction:
        return
    yield Finding(
        "sampler-rounds-keys", "warning", "rollout.vllm.kv_cache_dtype",
        "fp8 rounds the sampler's keys and values, so its log-probs differ from the trainer's, and no correction is "
        "set",
        "set objective.correction to tis or icepop, and watch the mismatch metrics; or remove it",
    )  # fmt: skip


def _padded_experts(recipe: Recipe, arch: Architecture, machine: Machine) -> Iterator[Finding]:
    """What the kernels of experts on Blackwell cost, and what they do not take."""
    rollout, kind = recipe.rollout, machine.device.kind.upper()
    if recipe.model.dtype != "bfloat16" and arch.num_experts:
        yield Finding(
            "experts-type", "error", "model.dtype",
            f"{recipe.model.dtype}: the experts that vLLM takes on a {kind} refuse all weights but bfloat16",
            f"set it to bfloat16, or rollout.vllm.moe_backend={UNPADDED}",
        )  # fmt: skip
    width, padded = expert_widths(recipe, arch)
    if width != padded:
        yield Finding(
            "experts-padded", "warning", "rollout.tensor_parallel",
            f"{rollout.tensor_parallel} cuts experts to a width of {width}, which vLLM pads to {padded} on a {kind}: "
            f"they take {padded / width:.2f} times the memory and the reading",
            f"set rollout.expert_parallel=true (whole experts of {arch.moe_intermediate_size}), a tensor_parallel that "
            f"leaves a multiple of {EXPERT_TILE}, or rollout.vllm.moe_backend={UNPADDED}",
        )  # fmt: skip
