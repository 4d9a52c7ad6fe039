"""DPPO (arXiv 2602.04879) with its total-variation mask: an objective in its own file, a trust rule and its axes.

    gspo train RECIPE objective.preset=recipes/objectives/dppo.py:DPPO objective.options.up=0.1

This file imports without torch, so `gspo plan` can read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gspo_megatron.config.objective_spec import ObjectiveSpec

if TYPE_CHECKING:
    from gspo_megatron.objective import Surrogate, TokenTerms


def binary_tv(terms: TokenTerms) -> Surrogate:
    """Mask a token when its probability (not its ratio) has moved too far in the direction of its advantage."""
    moved = (terms.logprobs.exp() - terms.old_logprobs.exp()).detach()
    low = (terms.advantages < 0) & (moved < -terms.options["down"])
    high = (terms.advantages > 0) & (moved > terms.options["up"])
    weight = terms.ratio.detach().clamp(max=terms.options["cap"]).masked_fill(low | high, 0.0)
    return terms.surrogate(weight * terms.advantages * terms.logprobs, low, high)


DPPO = ObjectiveSpec(
    name="dppo",
    ratio_level="token",
    trust=f"{__file__}:binary_tv",
    options={"down": 0.2, "up": 0.2, "cap": 20.0},
    aggregation="token_mean",
)
