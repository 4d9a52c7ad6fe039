"""One rank of the planner's memory test: what a policy of each layout really allocates, to memory-RANK.json."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.config import load
from gspo_megatron.plan.memory import has_expert_buffers
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import OptimizerSettings, Policy


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
    policy = Policy(load(Path("recipes/tiny_moe.yaml"), overrides), device)
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
    return {name.strip(): size for name, size in held.items() if size}


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
