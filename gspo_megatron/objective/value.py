"""The critic's part of the loss, and what is logged of it.

PPO, https://arxiv.org/abs/1707.06347, with the clipped value loss of its authors' implementation. For a token with the
value V, the value V_old before the first update of the batch and the return R:

    L_V = 1/2 max( (V - R)^2,  (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2 )

It is averaged like the policy's terms, and the loss is  -J + value_coefficient L_V.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.bounded import limit_gradient
from gspo_megatron.objective.inputs import LossInputs
from gspo_megatron.objective.packed import Packed

VALUE_LOSS = "value_loss"


def value_loss(
    spec: ObjectiveSpec, packed: Packed, inputs: LossInputs, weights: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of the mean L_V, with its gradient, and metric sums.

    Args:
        spec: value_clip.
        packed: of the inputs.
        inputs: values, old_values and returns.
        weights: [T] or a number: what one token's term counts.
    """
    assert inputs.values is not None and inputs.old_values is not None and inputs.returns is not None
    values = packed.trained(inputs.values)
    limit_gradient(values, inputs.values.dtype)
    old, returns = packed.trained(inputs.old_values.detach()), packed.trained(inputs.returns.detach())
    error = (values - returns).square()
    bounded = (old + (values - old).clamp(-spec.value_clip, spec.value_clip) - returns).square()
    share = (torch.maximum(error, bounded) / 2 * weights).sum()
    with torch.no_grad():
        # Of the values that the advantages were taken from: what the critic knew before it saw the batch.
        residual = returns - old
        sums = {
            VALUE_LOSS: share.detach(),
            "value_clipped": ((bounded > error) & packed.mask).sum(dtype=torch.float64),
            "value_old": old.sum(),
            "return": returns.sum(),
            "return_square": returns.square().sum(),
            "residual": residual.sum(),
            "residual_square": residual.square().sum(),
        }
    return share, sums


def value_metrics(value: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Logged metrics of the critic from the sums over a number of trained tokens; none without one."""
    if VALUE_LOSS not in value:
        return {}
    returns = value["return"] / tokens
    spread = value["return_square"] / tokens - returns**2
    missed = value["residual_square"] / tokens - (value["residual"] / tokens) ** 2
    return {
        VALUE_LOSS: value[VALUE_LOSS],
        "value_clipped": value["value_clipped"] / tokens,
        "value_mean": value["value_old"] / tokens,
        "return_mean": returns,
        # Undefined where all returns are equal; 0 there, like a critic that says the mean.
        "explained_variance": 1 - missed / spread if spread > 1e-20 else 0.0,
    }
