"""Which sequences have a gradient, as all ranks that compute together agree.

The loss reaches the model through its log-probs only. Its gradient with respect to them, [T] numbers, is known right
after the forward pass; a sequence whose numbers are all 0 (clipped, advantage 0, dropped by a correction) needs no
backward pass. Ranks of one model replica must leave out the same, and so must the replicas that exchange tokens between
experts, or a collective would wait for ever.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gspo_megatron.policy.mesh import ContextShare


def gradient_of(share: Tensor, logprobs: Tensor) -> Tensor:
    """[T] gradient of a rank's share of the loss with respect to its log-probs; the model is not touched."""
    (gradient,) = torch.autograd.grad(share, logprobs, retain_graph=True)
    return gradient


def surviving_sequences(gradient: Tensor, cu_seqlens: Tensor, share: ContextShare) -> tuple[list[int], list[int]]:
    """The sequences of a micro-batch that take a backward pass, the same on all ranks that hold parts of it.

    Where another rank of the expert-parallel group has one and this one has none, its shortest goes along with
    gradients of 0: the exchange between experts needs every rank.

    Args:
        gradient: [T_local] of the loss with respect to the log-probs; NaN is no 0.
        cu_seqlens: [S+1] starts among the local tokens.
        share: the ranks that hold the others.

    Returns:
        Their numbers, and `cu_seqlens` on the host.
    """
    positions = torch.arange(len(gradient), device=gradient.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
    flags = torch.zeros(len(cu_seqlens) - 1, device=gradient.device)
    flags.index_add_(0, sequence, (gradient != 0).float())
    for group in (share.group, parallel_state.get_tensor_model_parallel_group()):
        if group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    somewhere = flags.amax()
    dist.all_reduce(somewhere, dist.ReduceOp.MAX, group=_expert_group())
    # The one question to the device: three small tensors in one copy.
    known = torch.cat([cu_seqlens.double(), flags.double(), somewhere.double()[None]]).tolist()
    starts, counts = [int(start) for start in known[: len(cu_seqlens)]], known[len(cu_seqlens) : -1]
    members = [number for number, count in enumerate(counts) if count]
    if not members and known[-1]:
        members = [min(range(len(counts)), key=lambda number: starts[number + 1] - starts[number])]
    return members, starts


def any_gradient(gradient: Tensor) -> bool:
    """Whether a gradient has a number that is not 0, here or on a rank that computes together with this one."""
    flag = (gradient != 0).any().float()
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=parallel_state.get_tensor_and_context_parallel_group())
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=_expert_group())
    return bool(flag)


def _expert_group() -> dist.ProcessGroup:
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group
