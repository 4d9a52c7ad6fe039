"""Arguments of `rollout.vllm` that vLLM 0.32 refuses at its start, when the trainer's nodes are allotted already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.estimate.server_steps import BLOCK
from gspo_megatron.types import Finding

BLOCK_MULTIPLE = 16
"""Its kernels on GPUs take multiples of it. Source: `v1/attention/backends/flash_attn.py`."""
OTHER_BACKENDS = ("MLA", "MSA", "SPARSE", "ROCM", "XPU", "CPU", "AMX", "SDPA", "NO_ATTENTION")
"""Parts of the names of kernels for another attention or processor. Source: `v1/attention/backends/registry.py`."""
USUAL_BACKENDS = "FLASH_ATTN, FLASHINFER, TRITON_ATTN or FLEX_ATTENTION"


def findings(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Hold the given arguments against each other, the longest sequence and the GPUs."""
    given = recipe.rollout.vllm.given()
    yield from _scheduler(recipe, given)
    yield from _blocks(recipe, machine, given)
    if machine.is_cpu:
        return
    backend = given.get("attention_backend")
    rows = [("attention_backend", backend), ("attention_config", given.get("attention_config", {}).get("backend"))]
    for name, value in rows:
        if isinstance(value, str) and any(part in value.upper() for part in OTHER_BACKENDS):
            yield _error(
                name, f"{value} computes another kind of attention, or on another processor, than this model's on a "
                f"{machine.device.kind.upper()}", f"remove it, or name {USUAL_BACKENDS}",
            )  # fmt: skip


def _error(name: str, message: str, fix: str) -> Finding:
    return Finding("server-refuses", "error", f"rollout.vllm.{name}", message, fix)


def _scheduler(recipe: Recipe, given: dict[str, Any]) -> Iterator[Finding]:
    """Source: `config/scheduler.py`, `verify_max_model_len`."""
    tokens, most, longest = (
        given.get("max_num_batched_tokens"),
        recipe.rollout.max_concurrency,
        recipe.rollout.max_sequence_tokens,
    )
    if tokens is None:
        # vLLM then takes what its other settings need.
        return
    if tokens < most:
        yield _error(
            "max_num_batched_tokens", f"{tokens} tokens a step are fewer than rollout.max_concurrency={most} responses "
            "of one token each", f"set it to {most} or more, or lower rollout.max_concurrency",
        )  # fmt: skip
    if given.get("enable_chunked_prefill") is False and tokens < longest:
        yield _error(
            "max_num_batched_tokens", f"{tokens} tokens a step are fewer than a sequence of {longest} (prompt and "
            "response), which rollout.vllm.enable_chunked_prefill=false does not let it cut",
            f"set it to {longest} or more, or remove enable_chunked_prefill",
        )  # fmt: skip


def _blocks(recipe: Recipe, machine: Machine, given: dict[str, Any]) -> Iterator[Finding]:
    size, count, longest = (
        given.get("block_size"),
        given.get("num_gpu_blocks_override"),
        recipe.rollout.max_sequence_tokens,
    )
    if size is not None and not machine.is_cpu and size % BLOCK_MULTIPLE:
        yield _error(
            "block_size", f"{size} is no multiple of {BLOCK_MULTIPLE}, which the attention's kernels want",
            f"set it to {max(1, round(size / BLOCK_MULTIPLE)) * BLOCK_MULTIPLE}, or remove it",
        )  # fmt: skip
    if count is None:
        return
    # Some kernels raise the size of a block that is not given; a larger one only holds more.
    each = (size or BLOCK["cpu" if machine.is_cpu else "gpu"]) * recipe.rollout.decode_context_parallel
    raised = size is None and (str(given.get("kv_cache_dtype", "")).startswith("fp8") or recipe.arch.head_dim > 128)
    # One block is never given out: padding points at it.
    if (count - 1) * each < longest and not raised:
        yield _error(
            "num_gpu_blocks_override", f"{count} blocks of {each} tokens, one of them for padding, do not hold a "
            f"sequence of {longest} (prompt and response)",
            f"set it to {-(-longest // each) + 1} or more, or remove it",
        )  # fmt: skip
