"""Trust rules: how far an importance ratio may carry a token.

A rule turns the terms of [T] tokens into the objective of each (to be maximised). One of your own is a function of
the same signature in any file, named `file.py:function` in the recipe: see recipes/objectives/dppo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.plugins import load_object


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What a rule returns, all [T]."""

    objective: Tensor
    """Term of each token, before aggregation."""
    low: Tensor
    """bool: tokens that lost their gradient on the left side."""
    high: Tensor
    """bool: on the right side."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What a rule may read, all [T] float64; untrained tokens hold harmless numbers and are left out afterwards."""

    spec: ObjectiveSpec
    """For the numbers of the rule: clip_low, clip_high, ratio_cap, options."""
    logprobs: Tensor
    """Current log-probs, with gradient."""
    old_logprobs: Tensor
    """Log-probs that the ratio divides by."""
    ratio: Tensor
    """Importance ratio at the spec's level, with the gradient of its token form."""
    advantages: Tensor
    """Advantage of each token."""

    @property
    def options(self) -> dict[str, float]:
        """`objective.options` of the recipe."""
        return self.spec.options

    def surrogate(self, objective: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Surrogate:
        """The result of a rule; without `low` and `high` no token lost its gradient."""
        nothing = torch.zeros_like(self.ratio, dtype=torch.bool)
        return Surrogate(objective, nothing if low is None else low, nothing if high is None else high)


TrustRule = Callable[[TokenTerms], Surrogate]


def find_rule(name: str) -> TrustRule:
    """A rule of the table below, or the function behind `file.py:function`."""
    return _RULES[name] if name in _RULES else _load_rule(name)


def outside_band(terms: TokenTerms) -> tuple[Tensor, Tensor]:
    """[T] bool twice: where the ratio left the band on the side that its advantage pushes it to."""
    low = (terms.advantages < 0) & (terms.ratio < 1 - terms.spec.clip_low)
    high = (terms.advantages > 0) & (terms.ratio > 1 + terms.spec.clip_high)
    return low.detach(), high.detach()


def clip_log_ratio(spec: ObjectiveSpec, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GMPO's clip, token by token before any mean: (log-ratio, low, high), each [T]."""
    low = (advantages < 0) & (log_ratio < -spec.clip_low)
    high = (advantages > 0) & (log_ratio > spec.clip_high)
    clipped = torch.where(low, -spec.clip_low, torch.where(high, spec.clip_high, log_ratio))
    return clipped, low.detach(), high.detach()


@cache
def _load_rule(name: str) -> TrustRule:
    rule = load_object(name)
    if not callable(rule):
        raise ValueError(f"trust={name} is a {type(rule).__name__}, not a function; name one that takes TokenTerms")
    return cast(TrustRule, rule)


def _plain(terms: TokenTerms) -> Surrogate:
    return terms.surrogate(terms.ratio * terms.advantages)


def _clip(terms: TokenTerms) -> Surrogate:
    low, high = outside_band(terms)
    # min(w A, clip(w) A), written with the sides it takes so that the metric and the gradient cannot disagree.
    bounded = torch.where(low, 1 - terms.spec.clip_low, torch.where(high, 1 + terms.spec.clip_high, terms.ratio))
    return terms.surrogate(bounded * terms.advantages, low, high)


def _dual_clip(terms: TokenTerms) -> Surrogate:
    clipped = _clip(terms)
    worst = ((terms.advantages < 0) & (terms.ratio > terms.spec.dual_clip_bound)).detach()
    objective = torch.where(worst, terms.spec.dual_clip_bound * terms.advantages, clipped.objective)
    return terms.surrogate(objective, clipped.low, clipped.high | worst)


def _detached_clip(terms: TokenTerms) -> Surrogate:
    weight = terms.ratio.detach().clamp(max=terms.spec.ratio_cap)
    return terms.surrogate(weight * terms.advantages * terms.logprobs)


def _soft_gate(terms: TokenTerms) -> Surrogate:
    negative = torch.full_like(terms.advantages, terms.spec.tau_negative)
    tau = torch.where(terms.advantages > 0, terms.spec.tau_positive, negative)
    gate = torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau
    return terms.surrogate(gate * terms.advantages)


def _mask(terms: TokenTerms) -> Surrogate:
    low, high = outside_band(terms)
    weight = torch.where(low | high, 0.0, terms.ratio.detach())
    return terms.surrogate(weight * terms.advantages * terms.logprobs, low, high)


_RULES: dict[str, TrustRule] = {
    "clip": _clip,
    "dual_clip": _dual_clip,
    "detached_clip": _detached_clip,
    "soft_gate": _soft_gate,
    "mask": _mask,
    # Its clip is over before the ratio exists: see clip_log_ratio.
    "log_clip": _plain,
    "none": _plain,
}
