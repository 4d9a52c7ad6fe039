"""One rank of the head test: vocabulary-parallel log-probs, entropy and gradients for several chunk sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.policy import mesh
from gspo_megatron.policy.head import chosen_logprobs


def main() -> None:
    """For every case write logprobs, entropy and gradients, gathered to the whole vocabulary, by rank 0."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    mesh.start_world()
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    data = torch.load(directory / "data.pt", weights_only=True)
    for index, case in enumerate(json.loads((directory / "cases.json").read_text())):
        hidden = data["hidden"].to(getattr(torch, case["dtype"]), copy=True).requires_grad_()
        rows = data["weight"].shape[0] // size
        weight = data["weight"][rank * rows : (rank + 1) * rows].to(hidden.dtype, copy=True).requires_grad_()
        if case["buffer"]:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        settings = (data["targets"], case["temperature"], case["chunk"], group)
        logprobs, entropy, _ = chosen_logprobs(hidden, weight, *settings)
        (logprobs * data["coefficients"]).sum().backward()
        dist.all_reduce(hidden.grad)
        assert (weight.grad is None) == case["buffer"], "a buffer takes the gradient in place of another tensor"
        gradient = weight.main_grad if case["buffer"] else weight.grad
        parts = [torch.empty_like(gradient) for _ in range(size)]
        dist.all_gather(parts, gradient)
        if rank == 0:
            found = {
                "logprobs": logprobs.detach(),
                "entropy": entropy,
                "hidden": hidden.grad,
                "weight": torch.cat(parts),
            }
            torch.save(found, directory / f"head_{index}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
