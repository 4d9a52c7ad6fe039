"""Sums over the sequences of a packed micro-batch, exact under context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverContext = Callable[[Tensor], Tensor]


def identity(values: Tensor) -> Tensor:
    """The sum over one rank."""
    return values


@dataclass(frozen=True, slots=True)
class Packed:
    """Which tokens of T are trained, and to which of S sequences each belongs. All sums are float64."""

    mask: Tensor
    """[T] bool."""
    sequence: Tensor
    """[T] int64, 0..S-1."""
    local_tokens: Tensor
    """[S] trained tokens on this context-parallel rank."""
    num_tokens: Tensor
    """[S] trained tokens on all of them: |y_i|."""
    sum_over_context: SumOverContext

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor, sum_over_context: SumOverContext) -> Packed:
        """Index a packed batch without asking the device for a size."""
        positions = torch.arange(mask.numel(), device=mask.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
        # On a GPU nobody has looked at cu_seqlens: tokens beyond its end go to the last sequence, not out of bounds.
        sequence = sequence.clamp(max=max(cu_seqlens.numel() - 2, 0))
        local = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=mask.device)
        local.index_add_(0, sequence, mask.double())
        return cls(mask, sequence, local, sum_over_context(local.clone()), sum_over_context)

    def trained(self, values: Tensor) -> Tensor:
        """[T] -> [T] float64, 0 at untrained positions whatever stood there, NaN included."""
        return torch.where(self.mask, values.double(), 0.0)

    def totals(self, values: Tensor) -> Tensor:
        """[T] -> [S]: the sum over each sequence, over all context-parallel ranks, detached."""
        sums = torch.zeros_like(self.num_tokens).index_add_(0, self.sequence, self.trained(values.detach()))
        return self.sum_over_context(sums)

    def means(self, values: Tensor) -> Tensor:
        """[T] -> [S]: the mean over each sequence's trained tokens, detached; 0 for a sequence without any."""
        return self.totals(values) / self.num_tokens.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [T]: each token gets its sequence's value."""
        return values.index_select(0, self.sequence)

    def local_parts(self, chosen: Tensor) -> Tensor:
        """[T] bool -> [S]: this rank's part of the share of each sequence's trained tokens that are chosen."""
        counts = torch.zeros_like(self.num_tokens).index_add_(0, self.sequence, (chosen & self.mask).double())
        return counts / self.num_tokens.clamp(min=1)

    def local_share(self) -> Tensor:
        """[S]: the part of each sequence that is on this rank, so that sums over ranks count a sequence once."""
        return self.local_tokens / self.num_tokens.clamp(min=1)
