"""What came before a token in its response: the least log-ratio of its prefix (MinPRO, arXiv 2601.22718)."""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.objective.packed import Packed


def least_before(packed: Packed, log_ratio: Tensor) -> Tensor:
    """[T] float64, detached: the least of a log-ratio over the trained tokens before each token of its sequence.

    0 where there are none, so that its exponential is a factor. A sequence must lie on this rank as a whole: a minimum
    does not cross context-parallel ranks, which only add.

    Args:
        packed: the sequences.
        log_ratio: [T].
    """
    sequence = packed.sequence
    beyond = torch.full_like(log_ratio, torch.inf, dtype=torch.float64).detach()
    least = torch.where(packed.mask, log_ratio.detach().double(), beyond)
    least = _earlier(least, sequence, beyond, 1)
    step = 1
    # Reaches of 1, 2, 4, ... tokens: no size is asked from the device, and no rounding enters.
    while step < sequence.numel():
        least = torch.minimum(least, _earlier(least, sequence, beyond, step))
        step *= 2
    return torch.where(torch.isinf(least), 0.0, least)


def _earlier(values: Tensor, sequence: Tensor, beyond: Tensor, step: int) -> Tensor:
    """[T]: the value `step` places before each token, `beyond` where that is another sequence."""
    step = min(step, values.numel())
    moved = torch.cat([beyond[:step], values[: values.numel() - step]])
    source = torch.cat([torch.full_like(sequence[:step], -1), sequence[: sequence.numel() - step]])
    return torch.where(source == sequence, moved, beyond)
