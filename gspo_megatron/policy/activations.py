"""Layer inputs that wait in host memory for their backward pass, where the recipe asks for it.

Under full recomputation a stage keeps one tensor a layer and micro-batch in flight, the layer's input. Here it is
copied to pinned memory when autograd saves it and back when the layer is computed again. Both copies are queued on the
computing stream, so that order alone makes them safe: each costs its bytes over the host link, next to a whole layer's
forward or recomputation.

Not Megatron's `fine_grained_activation_offloading`: it learns in the first pass (here one without gradients) how many
micro-batches a step has and what each offloads, takes every later step to be the same, and quietly keeps on the device
what comes beyond it. Ours is a different number in every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

STATES_DIM = 3
Kept = Tensor | tuple[torch.device, Tensor]


def offload_inputs(decoder: torch.nn.Module) -> None:
    """Let what the layers of a fully recomputed decoder save lie in host memory."""
    forward = decoder.forward

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(to_host, to_device):
            return forward(*args, **kwargs)

    decoder.forward = offloading  # type: ignore[method-assign]


def to_host(tensor: Tensor) -> Kept:
    """A copy of hidden states [T, 1, H]; weights, and the rotary angles [T, 1, 1, d] that all layers share, stay."""
    if tensor.dim() != STATES_DIM:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor, non_blocking=True)


def to_device(kept: Kept) -> Tensor:
    """The tensor again, where it was."""
    if isinstance(kept, Tensor):
        return kept
    device, copy = kept
    return copy.to(device, non_blocking=True)
