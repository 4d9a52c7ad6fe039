"""Arguments of `rollout.vllm` that vLLM 0.32 refuses at its start, when the trainer's nodes are allotted already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gspo_megatron.cluster.machines import BLACKWELL, HOPPER, Machine
from gspo_megatron.config.schema import Recipe
from gspo_megatron.plan.estimate.server_steps import BLOCK, captures_nothing
from gspo_megatron.plan.units import value_text
from gspo_megatron.types import Finding

BLOCK_MULTIPLE = 16
"""Its kernels on GPUs take multiples of it. Source: `v1/attention/backends/flash_attn.py`."""
OTHER_BACKENDS = ("MLA", "MSA", "SPARSE", "ROCM", "XPU", "CPU", "AMX", "SDPA", "NO_ATTENTION")
"""Parts of the names of kernels for another attention or processor. Source: `v1/attention/backends/registry.py`."""
USUAL_BACKENDS = "FLASH_ATTN, FLASHINFER, TRITON_ATTN or FLEX_ATTENTION"
KV_TYPES = {"FLASH_ATTN": ("fp8", "fp8_e4m3"), "FLEX_ATTENTION": ()}
"""Kernels that do not take every fp8 type of keys and values, and the ones that they take. Source:
`supported_kv_cache_dtypes` of `v1/attention/backends/`."""


def findings(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    """Hold the given arguments against each other, the longest sequence and the GPUs."""
    given = recipe.rollout.vllm.given()
    yield from _scheduler(recipe, given)
    yield from _blocks(recipe, machine, given)
    if machine.is_cpu:
        return
    yield from _graphs(recipe, machine, given)
    yield from _kv_types(recipe, machine, given)
    backend = given.get("attention_backend")
    inner = given.get("attention_config", {}).get("backend")
    if backend is not None and inner is not None:
        yield _error(
            "attention_config", f"backend={inner} names the kernels a second time (attention_backend={backend})",
            "remove one of them",
        )  # fmt: skip
    rows = [("attention_backend", backend), ("attention_config", inner)]
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


def _graphs(recipe: Recipe, machine: Machine, given: dict[str, Any]) -> Iterator[Finding]:
    """Source: `config/vllm.py`, `_set_cudagraph_sizes`."""
    names = [name for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size") if name in given]
    if captures_nothing(recipe):
        for name in names:
            yield _error(name, f"{value_text(given[name])} has no effect: no graph is captured", "remove it")
        return
    sizes, most = given.get("cudagraph_capture_sizes"), given.get("max_cudagraph_capture_size")
    if most == 0:
        yield _error(
            "max_cudagraph_capture_size", "0 is no size of a graph",
            "set it to 1 or more, or set enforce_eager=true for none",
        )  # fmt: skip
    if sizes and most is not None and most != max(sizes):
        yield _error(
            "max_cudagraph_capture_size", f"{most} is not the largest of cudagraph_capture_sizes, {max(sizes)}",
            "remove one of them",
        )  # fmt: skip


def _kv_types(recipe: Recipe, machine: Machine, given: dict[str, Any]) -> Iterator[Finding]:
    """Types of keys and values beside the weights', the kernels and the GPU."""
    kind = str(given.get("kv_cache_dtype", ""))
    if not kind.startswith("fp8"):
        return
    if kind == "fp8_e5m2" and recipe.rollout.weight_dtype == "fp8":
        yield _error(
            "kv_cache_dtype", "fp8_e5m2 is refused beside weights in fp8 (rollout.weight_dtype=fp8)",
            "set it to fp8_e4m3",
        )  # fmt: skip
    backend = given.get("attention_backend") or given.get("attention_config", {}).get("backend")
    taken = KV_TYPES.get(str(backend).upper())
    if taken is not None and kind not in taken:
        yield _error(
            "kv_cache_dtype", f"{backend} has no kernels for {kind}",
            f"set it to {' or '.join((*taken, 'auto'))}, or name FLASHINFER or TRITON_ATTN",
        )  # fmt: skip
    elif taken and machine.device.kind not in (*HOPPER, *BLACKWELL, "gpu"):
        yield _error(
            "kv_cache_dtype", f"{backend} has kernels for {kind} on {', '.join((*HOPPER, *BLACKWELL))} only, not on "
            f"{machine.device.kind}", "remove it, or name TRITON_ATTN",
        )  # fmt: skip
