"""The contracts of an objective and of a trust rule from a user's own file."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.config.axes import TRUST_RULES
from gspo_megatron.config.hooks import is_reference
from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.config.plugins import describe_fault, source_of
from gspo_megatron.objective.inputs import BatchTotals, LossInputs
from gspo_megatron.objective.loss import policy_loss
from gspo_megatron.objective.trust import Surrogate, TokenTerms, find_rule


def check_objective(found: Any) -> list[str]:
    """Check an objective: its axes, its trust rule, and loss and gradient of a sample batch.

    Raises:
        ValueError: one fault a line.
    """
    if not isinstance(found, ObjectiveSpec):
        raise ValueError(f"is a {_kind(found)}; name an ObjectiveSpec: NAME = ObjectiveSpec(name=..., ...)")
    spec = found
    if spec.aggregation == "constant" and spec.aggregation_length is None:
        spec = spec.replace(aggregation_length=16)  # a run takes rollout.max_answer_tokens
    checked = [found.describe()]
    if is_reference(spec.trust):
        checked += check_trust_rule(find_rule(spec.trust), spec)
    elif spec.trust not in TRUST_RULES:
        raise ValueError(f"has trust={spec.trust}, which is no rule; name a built-in one or file.py:function")
    inputs = _sample_batch(spec)
    try:
        loss = policy_loss(spec, inputs).loss
        loss.backward()
    # The code is the user's own and may raise anything.
    except Exception as error:
        raise ValueError(f"its loss fails ({describe_fault(error)}); correct the axes") from None
    gradient = inputs.logprobs.grad
    if gradient is None or not bool(torch.isfinite(loss) & torch.isfinite(gradient).all()):
        raise ValueError("its loss or gradient is not finite on a sample batch; keep the numbers within bounds")
    if not bool((gradient != 0).any()):
        raise ValueError("its gradient is 0 on a sample batch, so nothing is learned; keep logprobs in the objective")
    return [*checked, f"loss {float(loss.detach()):.4g} and a finite gradient on a sample batch"]


def check_trust_rule(found: Any, spec: ObjectiveSpec | None = None) -> list[str]:
    """Check a trust rule on terms of 6 tokens. Raises ValueError with one fault a line.

    Args:
        found: the rule.
        spec: the objective that it belongs to, for its options; None = GSPO's with any option at 0.2.
    """
    if inspect.isclass(found) or not callable(found):
        raise ValueError(f"is a {_kind(found)}; name a function rule(terms) -> Surrogate")
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise ValueError(f"cannot be called as rule(terms): {error}; take TokenTerms alone") from None
    # A copy is not validated, which would turn the options into a plain dict.
    terms = _sample_terms(spec or ObjectiveSpec(ratio_level="token").model_copy(update={"options": _AnyOption()}))
    try:
        result = found(terms)
    # The code is the user's own and may raise anything.
    except Exception as error:
        raise ValueError(f"raised {describe_fault(error, source_of(found))}; take all numbers from terms") from None
    if not isinstance(result, Surrogate):
        raise ValueError(f"returned {_kind(result)}; return terms.surrogate(value, low, high)")
    faults = [*_tensor_faults(result, terms)]
    if not faults:
        faults += _gradient_faults(result.objective, terms.logprobs)
    if faults:
        raise ValueError("\n".join(faults))
    return [f"returned the objective of {terms.logprobs.numel()} sample tokens with a finite gradient"]


class _AnyOption(dict[str, float]):
    """`objective.options` of a rule whose recipe is not known here."""

    def __missing__(self, name: str) -> float:
        return 0.2


def _kind(value: Any) -> str:
    return f"class {value.__name__}" if inspect.isclass(value) else type(value).__name__


def _sample_terms(spec: ObjectiveSpec) -> TokenTerms:
    """Six tokens: ratios below, at and above 1 under advantages of both signs."""
    logprobs = torch.tensor([-1.0, -2.0, -0.1, -1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([-0.5, 0.0, 0.5, -0.5, 0.0, 0.5], dtype=torch.float64)
    old = logprobs.detach() - moved
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    # A leaf of its own would hide whether the gradient reaches the log-probs.
    return TokenTerms(spec, logprobs, old, (logprobs - old).exp(), advantages)


def _tensor_faults(result: Surrogate, terms: TokenTerms) -> list[str]:
    faults, shape = [], terms.logprobs.shape
    for name, dtype in (("objective", None), ("low", torch.bool), ("high", torch.bool)):
        value = getattr(result, name)
        if not isinstance(value, Tensor):
            faults.append(f"returned a {type(value).__name__} as {name}; return a tensor [T]")
        elif value.shape != shape:
            faults.append(f"returned {name} of shape {list(value.shape)}, expected [T] = {list(shape)}; reduce nothing")
        elif dtype is not None and value.dtype != dtype:
            faults.append(f"returned {name} as {value.dtype}, expected bool; compare instead of multiplying")
    return faults


def _gradient_faults(objective: Tensor, logprobs: Tensor) -> list[str]:
    if not bool(torch.isfinite(objective).all()):
        return ["returned values that are not finite; bound the ratio"]
    if not objective.requires_grad:
        return ["returned an objective without gradient; keep terms.logprobs or terms.ratio in it, not detached"]
    (gradient,) = torch.autograd.grad(objective.sum(), logprobs, allow_unused=True)
    if gradient is None or not bool((gradient != 0).any()):
        return ["returned an objective whose gradient is 0 for every token; leave some token trained"]
    if not bool(torch.isfinite(gradient).all()):
        return ["returned an objective whose gradient is not finite; bound the ratio"]
    return []


def _sample_batch(spec: ObjectiveSpec) -> LossInputs:
    """Two sequences of 3 tokens, of both advantages, just inside any clip band."""
    moved = torch.tensor([1e-5, -2e-5, 3e-5, -1e-5, 2e-5, -3e-5], dtype=torch.float64)
    old = torch.tensor([-1.0, -2.0, -0.1, -1.0, -2.0, -0.1], dtype=torch.float64)
    return LossInputs(
        logprobs=(old + moved).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old.clone(),
        reference_logprobs=old.clone(),
        advantages=torch.tensor(
            [1.0, 1.0, 1.0, -0.5, -0.5, -0.5] if spec.has_token_advantages else [1.0, -0.5]
        ).double(),
        loss_mask=torch.ones(6, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 3, 6]),
        totals=BatchTotals(sequences=2, tokens=6),
        staleness=torch.tensor([0, 0, 1, 0, 1, 2], dtype=torch.float64),
        values=torch.zeros(6, dtype=torch.float64),
        old_values=torch.zeros(6, dtype=torch.float64),
        returns=old + 1.5,
    )
