"""The policy objective: one function for every point in the table of axes.

Shapes: T tokens of one packed micro-batch (this context-parallel rank's part), S sequences in it. Everything inside
is float64: on [T] vectors that costs nothing beside a forward, and no sum depends on how a batch was split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.correction import correction_factor
from gspo_megatron.objective.inputs import LossInputs, LossOutput, check_shapes, check_values
from gspo_megatron.objective.kl import kl_estimate
from gspo_megatron.objective.metrics import metric_sums
from gspo_megatron.objective.packed import Packed, SumOverContext, identity
from gspo_megatron.objective.trust import Surrogate, TokenTerms, clip_log_ratio, find_rule


def policy_loss(spec: ObjectiveSpec, inputs: LossInputs, sum_over_context: SumOverContext = identity) -> LossOutput:
    """This rank's share of the loss and of every metric.

    Args:
        spec: the objective.
        inputs: one packed micro-batch; it may be empty.
        sum_over_context: adds a detached [S] tensor over the context-parallel ranks that share these sequences.
    """
    check_shapes(spec, inputs)
    if inputs.logprobs.device.type == "cpu":
        check_values(inputs)
    packed = Packed.of(inputs.loss_mask, inputs.cu_seqlens, sum_over_context)
    current = packed.trained(inputs.logprobs)
    old = packed.trained(inputs.old_logprobs.detach())
    sampler = None if inputs.rollout_logprobs is None else packed.trained(inputs.rollout_logprobs.detach())
    advantages = _token_advantages(packed, inputs)

    surrogate, log_s = _surrogate(spec, packed, current, _ratio_base(spec, old, sampler), advantages)
    factor = None
    objective = surrogate.objective
    if spec.correction and sampler is not None:
        factor = correction_factor(spec, packed, current, old, sampler, advantages)
        objective = objective * factor
    divergence = None
    if spec.kl != "none" and spec.kl_in == "loss" and inputs.reference_logprobs is not None:
        reference = packed.trained(inputs.reference_logprobs.detach())
        divergence = kl_estimate(spec.kl, current, reference, (current - old).exp())
        objective = objective - spec.kl_coefficient * divergence

    share = -(torch.where(packed.mask, objective, 0.0) * _token_weights(spec, packed, inputs)).sum()
    metrics = metric_sums(packed, share, current, old, sampler, advantages, surrogate, log_s, factor, divergence)
    return LossOutput(share.to(inputs.logprobs.dtype), metrics)


def _token_advantages(packed: Packed, inputs: LossInputs) -> Tensor:
    """[T] advantage of each trained token."""
    advantages = inputs.advantages.detach()
    return packed.trained(advantages if inputs.advantages_per_token else packed.spread(advantages))


def _ratio_base(spec: ObjectiveSpec, old: Tensor, sampler: Tensor | None) -> Tensor:
    """[T] log-probs that the ratio divides by."""
    return sampler if spec.ratio_reference == "sampler" and sampler is not None else old


def _surrogate(
    spec: ObjectiveSpec, packed: Packed, current: Tensor, base: Tensor, advantages: Tensor
) -> tuple[Surrogate, Tensor]:
    """The objective of each token, and [S] log s = the mean log-ratio of each sequence before any clip."""
    # Differences first, then the sum: the two sums are each about T in size, their difference about 1e-4 T.
    log_ratio = current - base
    log_s = packed.means(log_ratio)
    center, low, high = log_s, None, None
    if spec.trust == "log_clip":
        log_ratio, low, high = clip_log_ratio(spec, log_ratio, advantages)
        center = packed.means(log_ratio)
    if spec.per_sequence:
        # x - sg(x) is exactly 0 and carries the gradient; added to the detached mean it has the value, the clip
        # condition and the gradient of the sequence ratio, and only two numbers a sequence cross ranks.
        log_ratio = (log_ratio - log_ratio.detach()) + packed.spread(center)
    surrogate = find_rule(spec.trust)(TokenTerms(spec, current, base, log_ratio.exp(), advantages))
    if low is not None and high is not None:
        surrogate = Surrogate(surrogate.objective, low, high)
    return surrogate, log_s


def _token_weights(spec: ObjectiveSpec, packed: Packed, inputs: LossInputs) -> Tensor | float:
    """[T] or a number: what one token's term counts in the loss of the whole mini-batch."""
    sequences, tokens = max(inputs.totals.sequences, 1), max(inputs.totals.tokens, 1)
    if spec.aggregation == "token_mean":
        return 1.0 / tokens
    if spec.aggregation == "seq_mean_token_sum":
        return 1.0 / sequences
    if spec.aggregation == "constant" and spec.aggregation_length is not None:
        return 1.0 / (sequences * spec.aggregation_length)
    return packed.spread(1.0 / (packed.num_tokens.clamp(min=1) * sequences))
