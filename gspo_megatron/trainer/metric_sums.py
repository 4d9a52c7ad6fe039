"""Metric sums of a step over all trainer ranks: added on each rank first, then reduced once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, Sums, policy_loss
from gspo_megatron.objective.metrics import MAXIMUM
from gspo_megatron.objective.summary import LEFT_OUT
from gspo_megatron.policy.policy import Policy

TOKEN_ENTROPY = "token_entropy"
"""Sum over trained tokens of the entropy of the next-token distribution."""


def zero_sums(spec: ObjectiveSpec, device: torch.device) -> dict[str, Tensor]:
    """Every sum that the objective gives, as 0: what a rank adds that computes no loss.

    They come from the objective itself, for one sequence without a trained token, so that no list of names is kept
    twice.
    """
    nothing = torch.zeros(1, dtype=torch.float64)
    inputs = LossInputs(
        logprobs=nothing,
        old_logprobs=nothing,
        rollout_logprobs=nothing,
        reference_logprobs=nothing,
        advantages=nothing,
        loss_mask=torch.zeros(1, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 1]),
        totals=BatchTotals(0, 0),
        staleness=nothing,
        values=nothing,
        old_values=nothing,
        returns=nothing,
        token_advantages=spec.has_token_advantages,
    )
    sums = {**policy_loss(spec, inputs).metrics, TOKEN_ENTROPY: nothing.sum()}
    sums |= {f"{LEFT_OUT}{unit}": nothing.sum() for unit in ("sequences", "tokens")}
    return {name: torch.zeros_like(value, device=device) for name, value in sums.items()}


def count_left_out(left_out: BatchTotals, policy: Policy) -> dict[str, Tensor]:
    """What is in no micro-batch, as sums: every rank knows all of it, and the first one of the last stage counts it."""
    counts = policy.at.data == policy.at.context == policy.at.tensor == 0
    found = {"sequences": left_out.sequences, "tokens": left_out.tokens}
    return {
        f"{LEFT_OUT}{unit}": torch.tensor(float(count if counts else 0), dtype=torch.float64, device=policy.device)
        for unit, count in found.items()
    }


def reduce_sums(minibatches: Sequence[Sums | None], zero: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The sums of every mini-batch over all ranks, on the host. Every rank calls it and gets the same.

    All additive entries travel in one reduction, all maxima in a second one.

    Args:
        minibatches: of each mini-batch this rank's sums over its micro-batches; None where it counts nothing.
        zero: `zero_sums`, which gives names, order and shapes.
    """
    parts = [zero if sums is None else sums for sums in minibatches]
    reduced: list[dict[str, Tensor]] = [{} for _ in parts]
    for maximum, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
        names = [name for name in zero if name.endswith(MAXIMUM) == maximum]
        flat = torch.cat([part[name].flatten() for part in parts for name in names])
        dist.all_reduce(flat, operation)
        pieces = iter(flat.cpu().split([zero[name].numel() for _ in parts for name in names]))
        for entry in reduced:
            entry.update({name: next(pieces).view(zero[name].shape) for name in names})
    return reduced
