"""Log-probs of chosen tokens without ever holding the logits.

hidden [T, H] and the vocabulary-parallel head weight [V/TP, H] -> float32 log-probs [T]. Logits exist for one chunk of
tokens at a time, in forward and again, recomputed, in backward. Workspace: two chunks of float32 logits, that is
8 * chunk * V/TP bytes (1.24 GB for 1024 tokens of 151,936), and one block of the weight's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

GRADIENT_BLOCK_ROWS = 8192
"""Rows of the weight's gradient that are computed at one time where they must be widened before they are added."""


class HeadOutput(NamedTuple):
    """What the head says about each token, [T] each."""

    logprobs: Tensor
    """Of each target, in at least float32; differentiable."""
    entropy: Tensor
    """Of each distribution, in nats; not differentiable."""
    normalizers: Tensor
    """Logarithm of the sum of exponentials; not differentiable."""


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup,
        known: HeadOutput | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.settings = (temperature, chunk, group)
        ctx.main_grad = getattr(weight, "main_grad", None)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normalizers = known or (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for part in _chunks(len(hidden) if known is None else 0, chunk):
            logprobs[part], entropy[part], normalizers[part] = _score_chunk(
                _logits(hidden[part], weight, temperature, wide), targets[part], group
            )
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.mark_non_differentiable(entropy, normalizers)
        return logprobs, entropy, normalizers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        temperature, chunk, group = ctx.settings
        wide = normalizers.dtype
        grad_hidden = torch.empty_like(hidden)
        # Where Megatron keeps a gradient buffer the chunks are added into it: no gradient of the weight beside it.
        kept: Tensor | None = ctx.main_grad
        grad_weight = torch.zeros_like(weight, dtype=wide) if kept is None else kept
        for part in _chunks(len(hidden), chunk):
            scale = grads[0][part] / temperature
            grad_logits = _logits(hidden[part], weight, temperature, wide)
            grad_logits = _gradient_of_logits(grad_logits, normalizers[part], scale, targets[part], group)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            _add_product(grad_weight, grad_logits, hidden[part])
            del grad_logits  # otherwise the next chunk's logits exist beside it
        return grad_hidden, grad_weight.to(weight.dtype) if kept is None else None, *[None] * 5


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk: int,
    group: dist.ProcessGroup,
    known: HeadOutput | None = None,
) -> HeadOutput:
    """Log-prob of each target and the entropy of each distribution, at a sampling temperature.

    Args:
        hidden: [T, H], the same on every tensor-parallel rank; its gradient comes back as this rank's part of a sum.
        weight: [V/TP, H] this rank's rows of the head. Its gradient is added to its `main_grad` where it has one.
        targets: [T] global token ids.
        chunk: tokens that have logits in memory at one time.
        group: the tensor-parallel ranks.
        known: the result for these very inputs where an earlier pass has it: then only the backward pass computes.
    """
    return HeadOutput(*_ChunkedLogProbs.apply(hidden, weight, targets, temperature, chunk, group, known))


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    return wide_product(hidden, weight.T, wide).div_(temperature)


def _score_chunk(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, entropies and logarithms of the normalizers, [chunk] each; one copy of the logits."""
    top = _reduce(logits.amax(-1), dist.ReduceOp.MAX, group)
    weights = (logits - top[:, None]).exp_()
    total = weights.sum(-1)
    sums = _reduce(torch.stack([total, weights.mul_(logits).sum(-1)]), dist.ReduceOp.SUM, group)
    normalizers = top + sums[0].log()
    chosen = _reduce(_chosen(logits, targets, group), dist.ReduceOp.SUM, group)
    return chosen - normalizers, normalizers - sums[1] / sums[0], normalizers


def _gradient_of_logits(
    logits: Tensor, normalizers: Tensor, scale: Tensor, targets: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """scale * (one-hot of the target - softmax), in the memory of the logits."""
    gradient = logits.sub_(normalizers[:, None]).exp_().mul_(-scale[:, None])
    local, held = _local_targets(targets, logits.shape[1], group)
    gradient[torch.arange(len(local), device=local.device), local] += torch.where(held, scale, 0.0)
    return gradient


def wide_product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right in a wider type; a GPU adds up in float32 anyway and need not round the sums."""
    if left.is_cuda and left.dtype is not wide:
        return torch.mm(left, right, out_dtype=wide)
    return (left @ right).to(wide)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total [V/TP, H] += grad_logits.T @ hidden, in the type of `total`."""
    if total.dtype is hidden.dtype:
        total.addmm_(grad_logits.T, hidden)
        return
    for start in range(0, len(total), GRADIENT_BLOCK_ROWS):
        rows = slice(start, start + GRADIENT_BLOCK_ROWS)
        total[rows] += wide_product(grad_logits[:, rows].T, hidden, total.dtype)


def _reduce(values: Tensor, operation: Any, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(values, operation, group=group)
    return values


def _local_targets(targets: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Row of each target among this rank's, clamped, and whether it really lies there."""
    local = targets - group.rank() * rows
    held = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1), held


def _chosen(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    local, held = _local_targets(targets, logits.shape[1], group)
    return torch.where(held, logits.gather(1, local[:, None])[:, 0], 0.0)
