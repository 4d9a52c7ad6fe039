"""What `rollout.vllm` changes of a server's engine step: captured graphs, tokens of a step, blocks of the KV cache."""

from __future__ import annotations

from gspo_megatron.cluster.machines import BLACKWELL, GIB, Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.vllm_engine import CPU_BLOCK, MIN_STEP_TOKENS
from gspo_megatron.plan.estimate.calibration import Rates
from gspo_megatron.types import ITEM_BYTES

BLOCK = {"gpu": 16, "cpu": CPU_BLOCK}
"""Tokens of a block where the recipe does not say. Source: vLLM's `config/cache.py`, `platforms/cpu.py`."""


NO_GRAPH = ("NONE", "0")
"""`CUDAGraphMode.NONE` by its name and its number, both of which vLLM reads. Source: `config/compilation.py`."""


def captures_nothing(recipe: Recipe) -> bool:
    """Whether a server on GPUs launches every kernel of a step one by one."""
    given = recipe.rollout.vllm.given()
    mode = str(given.get("compilation_config", {}).get("cudagraph_mode", ""))
    return bool(given.get("enforce_eager")) or given.get("optimization_level") == "O0" or mode.upper() in NO_GRAPH


def largest_graph(recipe: Recipe, machine: Machine) -> int:
    """Responses of a decoding step up to which vLLM replays a captured graph; 0 = none is captured.

    Source: vLLM's `config/vllm.py`, `_set_cudagraph_sizes`.
    """
    if captures_nothing(recipe):
        return 0
    given = recipe.rollout.vllm.given()
    most = given.get("max_cudagraph_capture_size")
    if sizes := given.get("cudagraph_capture_sizes"):
        return max((size for size in sizes if most is None or size <= most), default=0)
    usual = min(2 * recipe.rollout.max_concurrency, 1024 if machine.device.kind in BLACKWELL else 512)
    return usual if most is None else most


def launch_seconds(recipe: Recipe, arch: Architecture, machine: Machine, batch: float, rates: Rates) -> float:
    """Least time of a stage's part of a decoding step whose kernels are launched one by one; 0 with a graph.

    Args:
        batch: responses that are decoded at a time.
    """
    if machine.is_cpu or batch <= largest_graph(recipe, machine):
        return 0.0
    return rates.eager_seconds * arch.num_hidden_layers


def usual_prompt_tokens(recipe: Recipe, machine: Machine) -> int:
    """Tokens that one engine step takes in where the recipe does not say.

    Source: vLLM's `engine/arg_utils.py`, for an API server; `engine_arguments` where there is no GPU.
    """
    if machine.is_cpu:
        return max(MIN_STEP_TOKENS, recipe.rollout.max_sequence_tokens)
    if machine.device.memory >= 160 * GIB:
        return 16384
    return 8192 if machine.device.memory >= 70 * GIB and machine.device.kind != "a100" else 2048


def prompt_tokens(recipe: Recipe, machine: Machine) -> int:
    """Tokens that one engine step takes in."""
    return recipe.rollout.vllm.given().get("max_num_batched_tokens") or usual_prompt_tokens(recipe, machine)


def step_bytes(recipe: Recipe, arch: Architecture, machine: Machine) -> int:
    """Bytes on one GPU that the largest step works in beyond those of a usual one, which `SERVER_BYTES` holds.

    States before and after a part; queries, keys and values; rows of the experts, whose two buffers share memory
    (vLLM's `fused_moe.py`). Below 0 where steps are smaller.
    """
    more = prompt_tokens(recipe, machine) - usual_prompt_tokens(recipe, machine)
    tensor, hidden = recipe.rollout.tensor_parallel, arch.hidden_size
    heads = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim / tensor
    width = (arch.moe_intermediate_size if arch.num_experts else arch.intermediate_size) / tensor
    rows = arch.num_experts_per_tok * (max(2 * width, hidden) + width) if arch.num_experts else 3 * width
    return int(more * (4 * hidden + heads + rows) * ITEM_BYTES[recipe.model.dtype])


def block_tokens(recipe: Recipe, machine: Machine) -> int | None:
    """Tokens that the blocks of `num_gpu_blocks_override` hold; one of them is for padding. None = not given."""
    given = recipe.rollout.vllm.given()
    count = given.get("num_gpu_blocks_override")
    if count is None:
        return None
    size = given.get("block_size") or BLOCK["cpu" if machine.is_cpu else "gpu"]
    return (count - 1) * size * recipe.rollout.decode_context_parallel
