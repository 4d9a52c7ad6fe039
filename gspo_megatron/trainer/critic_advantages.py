"""Advantages of a critic, one a token: its values of the old policy's pass, and the reward at the end of a response.

The recursion runs along a whole response, so the values of the context-parallel ranks are brought together first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.objective import ObjectiveSpec, generalized_advantages, normalize_tokens
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import Policy
from gspo_megatron.trainer.batches import MiniBatch, ScoredMicroBatch, TrainingMicroBatch
from gspo_megatron.types import SampleRef


def with_critic_advantages(
    spec: ObjectiveSpec,
    minibatches: Sequence[MiniBatch[ScoredMicroBatch]],
    rewards: Mapping[SampleRef, float],
    policy: Policy,
) -> list[MiniBatch[TrainingMicroBatch]]:
    """Mini-batches with advantages normalised over all trained tokens of the rollout batch. Every rank calls it.

    Args:
        spec: gae_discount, gae_decay, advantage_ddof, advantage_eps.
        minibatches: the whole rollout batch, scored.
        rewards: of every response, after every rule.
        policy: of the pass that gave the values.
    """
    parts = [micro for one in minibatches for micro in one.micro_batches]
    plain = [_advantages(spec, micro, rewards) for micro in parts]
    # The tensor-parallel ranks of a stage hold the same tokens, and only the last stage has values.
    counts = policy.is_last_stage and policy.at.tensor == 0
    masks = [micro.batch.loss_mask for micro in parts]
    normalised = normalize_tokens(plain, masks, _sum_over_ranks, spec.advantage_ddof, spec.advantage_eps, counts)
    ready = iter(zip(parts, plain, normalised, strict=True))
    return [one.ready([_ready(*next(ready)) for _ in one.micro_batches]) for one in minibatches]


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _ready(micro: ScoredMicroBatch, plain: Tensor, normalised: Tensor) -> TrainingMicroBatch:
    values = None if micro.old is None else micro.old.values
    returns = None if values is None else values.double() + plain
    return micro.ready(normalised, returns)


def _advantages(spec: ObjectiveSpec, micro: ScoredMicroBatch, rewards: Mapping[SampleRef, float]) -> Tensor:
    """[T_local] float64 before normalisation; 0 off the last stage."""
    batch = micro.batch
    if micro.old is None or micro.old.values is None:
        return torch.zeros(len(batch.loss_mask), dtype=torch.float64, device=batch.loss_mask.device)
    starts = batch.params.cu_seqlens_q
    values, trained = _whole(batch, micro.old.values), _whole(batch, batch.loss_mask) > 0
    given = torch.zeros_like(values)
    # A micro-batch that only fills a slot has no reference, and nothing in it is trained.
    for ref, start, end in zip(micro.refs, starts[:-1].tolist(), starts[1:].tolist(), strict=False):
        at = trained[start:end].nonzero()
        if len(at):
            given[start + int(at[-1])] = rewards[ref]
    whole = generalized_advantages(given, values, trained, starts, spec.gae_discount, spec.gae_decay)
    return whole.to(values.device)[batch.indices]


def _whole(batch: MicroBatch, mine: Tensor) -> Tensor:
    """[T] float64 of the whole pack, on each of the ranks that share it."""
    whole = torch.zeros(int(batch.params.cu_seqlens_q[-1]), dtype=torch.float64, device=mine.device)
    whole[batch.indices] = mine.double()
    return batch.share.sum(whole)
