"""The policy objective. One function computes GSPO and its relatives, which are points in one table of axes.

GSPO, https://arxiv.org/abs/2507.18071. For one prompt the old policy samples G responses y_1 .. y_G, and response i is
scored with the reward r_i:

    (5)  J   = E[ 1/G  sum_i  min( s_i A_i,  clip(s_i, 1 - eps_low, 1 + eps_high) A_i ) ]
    (6)  A_i = ( r_i - mean(r_1 .. r_G) ) / std(r_1 .. r_G)
    (7)  s_i = ( pi(y_i | x) / pi_old(y_i | x) )^(1 / |y_i|)
             = exp( 1/|y_i|  sum_t  log pi(y_it | x, y_i<t) - log pi_old(y_it | x, y_i<t) )

In words: (6) a response is as good as its reward is above the mean of its group, in standard deviations of the group.
(7) The importance ratio belongs to a whole sequence: it is the geometric mean of its token ratios. (5) The gradient of
a response stops as a whole once its ratio has left the band on the side that its advantage pushes it to. J is
maximised; the loss is -J.

    A_i                 advantages.group_advantages; here `advantages`
    log pi, log pi_old  `current`, `old`: log-probs of the weights in training, and of those before the first update
    |y_i|               `packed.num_tokens`: trained tokens, without prompt, tool output and padding
    log s_i             `log_s` = packed.means(current - old); with its gradient s_i is `TokenTerms.ratio`
    min(.., clip(..))   trust.py, rule `clip`; eps_low, eps_high are `clip_low`, `clip_high`
    1/G sum_i           `_token_weights`: each of |y_i| tokens counts 1 / (|y_i| N), N = sequences of the mini-batch

Shapes: T tokens of one packed micro-batch (this context-parallel rank's part), S sequences in it. All arithmetic is in
float64: on [T] vectors that costs nothing beside a forward, and no sum depends on how a batch was split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.bounded import bounded_exp, limit_gradient, narrowed
from gspo_megatron.objective.correction import correction_factor
from gspo_megatron.objective.inputs import LossInputs, LossOutput, check_shapes, check_values
from gspo_megatron.objective.kl import kl_estimate
from gspo_megatron.objective.metrics import TEACHER_KL, compared_sums, metric_sums
from gspo_megatron.objective.packed import Packed, SumOverContext, identity
from gspo_megatron.objective.prefix import least_before
from gspo_megatron.objective.trust import Surrogate, TokenTerms, clip_log_ratio, find_rule
from gspo_megatron.objective.value import value_loss


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
    limit_gradient(current, inputs.logprobs.dtype)
    sampler = None if inputs.rollout_logprobs is None else packed.trained(inputs.rollout_logprobs.detach())
    old = sampler if inputs.old_logprobs is None else packed.trained(inputs.old_logprobs.detach())
    assert old is not None, "check_shapes refuses inputs that have neither"
    advantages = _token_advantages(packed, inputs)
    base = _ratio_base(spec, packed, inputs, current, old)
    # Interpolated log-probs are the old policy of everything but the metrics.
    proximal = base if spec.ratio_reference == "interpolated" else old

    surrogate, log_s = _surrogate(spec, packed, current, base, advantages)
    factor = None
    objective = surrogate.objective
    if spec.correction and sampler is not None:
        factor = correction_factor(spec, packed, current, proximal, sampler, advantages)
        objective = objective * factor
    divergence = None
    if spec.kl != "none" and spec.kl_in == "loss" and inputs.reference_logprobs is not None:
        reference = packed.trained(inputs.reference_logprobs.detach())
        divergence = kl_estimate(spec.kl, current, reference, bounded_exp(current - proximal))
        objective = objective - spec.kl_coefficient * divergence

    weights = _token_weights(spec, packed, inputs)
    share = -(torch.where(packed.mask, objective, 0.0) * weights).sum()
    value_sums: dict[str, Tensor] = {}
    if spec.has_critic:
        value_share, value_sums = value_loss(spec, packed, inputs, weights)
        share = share + spec.value_coefficient * value_share
    metrics = metric_sums(packed, share, current, old, sampler, advantages, surrogate, log_s, factor, divergence)
    metrics |= value_sums
    if spec.has_teacher:
        metrics[TEACHER_KL] = -advantages.sum()
    metrics |= compared_sums(packed, metrics, inputs.old_logprobs is not None)
    clipped = torch.stack([packed.local_parts(side) for side in (surrogate.low, surrogate.high)])
    return LossOutput(narrowed(share, inputs.logprobs.dtype), metrics, clipped)


def _token_advantages(packed: Packed, inputs: LossInputs) -> Tensor:
    """[T] advantage of each trained token."""
    advantages = inputs.advantages.detach()
    return packed.trained(advantages if inputs.advantages_per_token else packed.spread(advantages))


def _ratio_base(spec: ObjectiveSpec, packed: Packed, inputs: LossInputs, current: Tensor, old: Tensor) -> Tensor:
    """[T] log-probs that the ratio divides by, detached."""
    if spec.ratio_reference == "recomputed" or inputs.rollout_logprobs is None:
        return old
    sampler = packed.trained(inputs.rollout_logprobs.detach())
    if spec.ratio_reference == "sampler" or inputs.staleness is None:
        return sampler
    # A-3PO, arXiv 2512.06547: (v_old - v_sampler) / (v_current - v_sampler) of the way between the two log-probs. The
    # old policy is one version behind the one in training, so a token of d versions ago is d / (d + 1) of the way.
    behind = packed.trained(inputs.staleness.detach())
    return sampler + behind / (behind + 1) * (current.detach() - sampler)


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
        # x - sg(x) is exactly 0 and has the gradient (sg = detach). Added to the detached mean it has the value, the
        # clip condition and the gradient of the sequence ratio (equation 14 of the paper), and only two numbers a
        # sequence cross ranks.
        log_ratio = (log_ratio - log_ratio.detach()) + packed.spread(center)
    elif spec.ratio_prefix == "minimum":
        log_ratio = log_ratio + least_before(packed, log_ratio)
    surrogate = find_rule(spec.trust)(TokenTerms(spec, current, base, bounded_exp(log_ratio), advantages))
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
