"""Detached factors for the gap between the sampler (mu) and the trainer's old policy: k = pi_old / mu.

A factor may be 0, but the token stays in |y_i| and in the denominators: a correction changes what a token weighs,
never what the sequence is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective.bounded import bounded_exp
from gspo_megatron.objective.packed import Packed


def correction_factor(
    spec: ObjectiveSpec, packed: Packed, current: Tensor, old: Tensor, sampler: Tensor, advantages: Tensor
) -> Tensor:
    """[T] float64, detached: the product of the factors that the spec names.

    Args:
        spec: names the factors and their bounds.
        packed: the sequences.
        current: [T] log-probs of the weights in training.
        old: [T] log-probs of the old weights, by the trainer.
        sampler: [T] log-probs reported by the sampler.
        advantages: [T].
    """
    log_k = (old - sampler).detach()
    k = bounded_exp(log_k)
    factor = torch.ones_like(k)
    for name in spec.correction:
        if name == "tis":
            factor = factor * k.clamp(max=spec.tis_cap)
        elif name in ("mis", "icepop"):
            low, high = spec.mask_bounds(name)
            factor = torch.where((k >= low) & (k <= high), factor * k, 0.0)
        elif name == "geometric_mask":
            mean = bounded_exp(packed.means(log_k))
            kept = (mean >= spec.geometric_low) & (mean <= spec.geometric_high)
            factor = torch.where(packed.spread(kept), factor, 0.0)
        elif name == "sequence_product":
            factor = factor * packed.spread(bounded_exp(packed.totals(log_k)).clamp(max=spec.tis_cap))
        elif name == "opsm":
            drifted = packed.spread(packed.means(sampler - current) > spec.opsm_delta)
            factor = torch.where(drifted & (advantages < 0), 0.0, factor)
        elif name == "trust_region_mask":
            # The sampled estimate of each token's KL is k2; one token beyond the region takes its response out.
            outside = (current - sampler).detach().square() / 2 > spec.trust_region_delta
            factor = torch.where(packed.spread(packed.totals(outside.double()) > 0), 0.0, factor)
        else:
            vetoed = packed.spread(packed.totals((k < spec.veto_below).double()) > 0)
            factor = torch.where(vetoed, 0.0, factor)
    return factor
