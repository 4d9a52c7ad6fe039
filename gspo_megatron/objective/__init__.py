"""Advantages, policy objectives and mismatch corrections: tensors in, a loss share and metric sums out.

Pure torch: no process groups, no configuration look-ups, no host synchronisation.
"""

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.advantages import (
    generalized_advantages,
    group_advantages,
    normalize_tokens,
    teacher_advantages,
)
from gspo_megatron.objective.inputs import BatchTotals, LossInputs, LossOutput, check_values
from gspo_megatron.objective.kl import kl_in_reward
from gspo_megatron.objective.loss import policy_loss
from gspo_megatron.objective.metrics import Sums, add_sums
from gspo_megatron.objective.shaping import is_trained, shape_rewards, soft_overlong_penalty
from gspo_megatron.objective.summary import finalize_metrics, finalize_step, group_metrics
from gspo_megatron.objective.trust import Surrogate, TokenTerms
from gspo_megatron.objective.warnings import runtime_warnings

__all__ = [
    "BatchTotals",
    "LossInputs",
    "LossOutput",
    "ObjectiveSpec",
    "Sums",
    "Surrogate",
    "TokenTerms",
    "add_sums",
    "check_values",
    "finalize_metrics",
    "finalize_step",
    "generalized_advantages",
    "group_advantages",
    "group_metrics",
    "is_trained",
    "kl_in_reward",
    "normalize_tokens",
    "policy_loss",
    "runtime_warnings",
    "shape_rewards",
    "soft_overlong_penalty",
    "teacher_advantages",
]
