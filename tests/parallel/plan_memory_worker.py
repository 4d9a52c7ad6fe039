"""One rank of the planner's memory test: what a policy of each layout really allocates, to memory-RANK.json."""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.estimate.memory import has_expert_buffers
from gspo_megatron.policy import mesh, offload
from gspo_megatron.policy.policy import OptimizerSettings, Policy
from gspo_megatron.types import Sample, SampleRef

TOKENS, MICRO_BATCHES = 64, 3
"""Of a micro-batch on one context-parallel rank; more micro-batches than stages."""


def main() -> None:
    """Run every case of cases.json in one world."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    cases = json.loads((directory / "cases.json").read_text())

    found = [measure(overrides, device) for overrides in cases]
    (directory / f"memory-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


def measure(overrides: list[str], device: torch.device) -> dict[str, int]:
    """Bytes by the planner's names, after one optimizer step over zero gradients."""
    policy = Policy(load_recipe(Path("recipes/tiny_moe.yaml"), overrides), device)
    policy.start_optimizer(OptimizerSettings(0.0, (0.9, 0.95), 1e-8, 0.0, 1.0))
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    policy.optimizer.step()
    apart = has_expert_buffers(policy.layout)
    dense, expert = ("dense", "expert") if apart else ("", "")
    held: Counter[str] = Counter()
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            held[f"{expert if _is_expert(parameter) else dense} weights"] += _bytes(parameter.data)
        for side, buffers in ((dense, chunk.buffers), (expert, chunk.expert_parallel_buffers)):
            held[f"{side} gradients"] += sum(_bytes(buffer.grad_data) for buffer in buffers)
    ours = {parameter.data_ptr() for chunk in policy.chunks for parameter in chunk.parameters()}
    for is_expert, parameter, states in _optimized(policy):
        side = expert if is_expert else dense
        held[f"{side} optimizer"] += sum(map(_bytes, states))
        if parameter.data_ptr() not in ours:  # a float32 main copy of a bfloat16 weight
            held[f"{side} optimizer"] += _bytes(parameter)
    if policy.recipe.model.dtype == "float32":  # norms keep a wider copy of anything narrower
        held["projection"] = _projection_bytes(policy)
    if policy.recipe.trainer.offload_activations:
        offloaded = _offloaded_bytes(policy)  # on every rank; the last stage also moves its final norm's input
        held["offloaded"] = offloaded if policy.at.pipeline == 0 else 0
    return {name.strip(): size for name, size in held.items() if size}


def _projection_bytes(policy: Policy) -> int:
    """The largest tensor that an attention layer keeps of its queries, keys and values."""
    attention: Any = policy.chunks[0].module.decoder.layers[0].self_attention
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    states = torch.randn(TOKENS // policy.layout.tensor, 1, policy.weights.arch.hidden_size, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        attention.get_query_key_value_tensors(states)
    return max(sizes)


def _offloaded_bytes(policy: Policy) -> int:
    """The most that lay in host memory at one time during a step of MICRO_BATCHES full micro-batches."""
    now = most = 0
    original = offload.to_host

    def count(tensor: torch.Tensor) -> Any:
        nonlocal now, most
        kept = original(tensor)
        if isinstance(kept, tuple):
            now += _bytes(kept[1])
            most = max(now, most)
            weakref.finalize(kept[1], free, _bytes(kept[1]))
        return kept

    def free(size: int) -> None:
        nonlocal now
        now -= size

    offload.to_host = count
    ref = SampleRef("", 0, 0, 1, TOKENS - 1, 0.0, "stop", ())
    words, trained = np.ones(TOKENS, np.int32), np.arange(TOKENS) > 0
    batches = [collate([Sample(words, trained, np.zeros(TOKENS, np.float32), ref)], TOKENS)] * MICRO_BATCHES
    policy.train(policy.place(batches), lambda _, scored, __: (scored.logprobs.sum(), {}), 0.0)
    offload.to_host = original
    return most


def _optimized(policy: Policy) -> Iterator[tuple[bool, torch.Tensor, list[torch.Tensor]]]:
    for chained in policy.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                states = chained.optimizer.state[parameter].values()
                yield (
                    group["is_expert_parallel"],
                    parameter,
                    [state for state in states if isinstance(state, torch.Tensor)],
                )


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nelement() * tensor.element_size()


if __name__ == "__main__":
    main()
