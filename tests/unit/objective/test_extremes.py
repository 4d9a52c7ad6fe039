"""Log-ratios of any size: the loss and its gradient are finite, and right wherever the type can hold them."""

from __future__ import annotations

import math
import os
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config.axes import TRUST_RULES
from gspo_megatron.objective import (
    BatchTotals,
    LossInputs,
    ObjectiveSpec,
    finalize_metrics,
    group_advantages,
    group_metrics,
    kl_in_reward,
    policy_loss,
)
from gspo_megatron.objective.bounded import LARGEST
from tests import reference
from tests.unit.objective.cases import PRESET_NAMES, as_rows, engine, preset, random_answers

CASES = settings(deadline=None, print_blob=True, max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10)
LEVELS = ("token", "sequence", "sequence_token")
ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
CORRECTIONS = ("tis", "mis", "icepop", "geometric_mask", "sequence_product", "opsm", "trust_region_mask", "veto")
LOGPROBS = st.one_of(st.floats(-90, 0), st.floats(-1500, 0), st.sampled_from([0.0, -88.0, -89.0, -710.0, -1e4, -1e30]))
"""Nats. float32 holds exp up to 88, float64 up to 709."""


def compute(
    spec: ObjectiveSpec, dtype: torch.dtype, advantage: float, **rows: list[float]
) -> tuple[float, list[float], Any]:
    """(loss, its gradient at each token, metric sums) of one sequence; `current` and others: log-probs, -1 if none."""
    length = len(rows["current"])

    def logprobs(name: str) -> torch.Tensor:
        return torch.tensor(rows.get(name, [-1.0] * length), dtype=dtype)

    current = logprobs("current").requires_grad_()
    inputs = LossInputs(
        logprobs=current,
        old_logprobs=logprobs("old"),
        rollout_logprobs=logprobs("sampler"),
        reference_logprobs=logprobs("reference"),
        advantages=torch.tensor([advantage]),
        loss_mask=torch.ones(length, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, length]),
        totals=BatchTotals(1, length),
        staleness=torch.arange(length, dtype=dtype),
        token_advantages=False,
    )
    out = policy_loss(spec, inputs)
    (gradient,) = torch.autograd.grad(out.loss, current)
    return float(out.loss.detach()), gradient.tolist(), out.metrics


def kl_only(kind: str) -> ObjectiveSpec:
    return ObjectiveSpec.preset("grpo").replace(kl=kind, kl_coefficient=1.0, trust="clip")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_a_token_100_nats_away_is_finite(dtype: torch.dtype) -> None:
    """The reported case: exp(100) is no float32, and was inf."""
    rows = {"current": [-101.0, -1.0], "old": [-101.0, -1.0], "reference": [-1.0, -1.5]}
    loss, gradient, metrics = compute(kl_only("k3"), dtype, 0.0, **rows)
    exact = (math.expm1(100.0) - 100.0 + math.expm1(-0.5) + 0.5) / 2
    largest = torch.finfo(dtype).max
    assert loss == pytest.approx(min(exact, largest), rel=1e-12)
    assert gradient[0] == pytest.approx(max(-math.expm1(100.0) / 2, -largest), rel=1e-12)
    assert gradient[1] == pytest.approx(-math.expm1(-0.5) / 2, rel=1e-6)
    assert float(metrics["reference_kl"]) == pytest.approx(2 * exact, rel=1e-12)


@pytest.mark.parametrize("gap", [200.0, 800.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clipped_token_has_no_gradient_however_far_away(dtype: torch.dtype, gap: float) -> None:
    """The reported case: 0 times exp(800) was not a number."""
    loss, gradient, _ = compute(ObjectiveSpec.preset("grpo"), dtype, 1.0, current=[-1.0, -1.0], old=[-1.0 - gap, -1.0])
    assert (loss, gradient) == (pytest.approx(-(1.27 + 1.0) / 2), [0.0, pytest.approx(-0.5)])


@CASES
@given(data=st.data())
def test_no_size_of_a_gap_gives_what_is_not_finite(data: st.DataObject) -> None:
    def one_of(values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    spec = ObjectiveSpec.preset("gspo").replace(
        trust=one_of(TRUST_RULES), ratio_level=one_of(LEVELS), kl=one_of(("none", *ESTIMATORS)), kl_coefficient=0.1,
        correction=data.draw(st.lists(st.sampled_from(CORRECTIONS), unique=True, max_size=2)),
        clip_low=0.2, clip_high=0.3, ratio_reference=one_of(("recomputed", "sampler", "interpolated")),
        ratio_prefix=one_of(("none", "minimum")),
        aggregation=one_of(("seq_mean_token_mean", "token_mean", "seq_mean_token_sum")),
    )  # fmt: skip
    names = ("current", "old", "sampler", "reference")
    rows = {name: data.draw(st.lists(LOGPROBS, min_size=3, max_size=3)) for name in names}
    advantage = one_of((1.0, -1.0, 0.0, -2.5))
    for dtype in (torch.float32, torch.float64):
        loss, gradient, metrics = compute(spec, dtype, advantage, **rows)
        assert math.isfinite(loss) and all(map(math.isfinite, gradient)), (loss, gradient)
        for name, value in (metrics | finalize_metrics(metrics)).items():
            assert bool(torch.isfinite(torch.as_tensor(value, dtype=torch.float64)).all()), name


@CASES
@given(gap=st.floats(-LARGEST, LARGEST), old=st.floats(-300, 300))
def test_estimators_are_their_formulas(gap: float, old: float) -> None:
    """In 50 digits: value and slope of each, wherever float64 can hold them."""
    with mpmath.workdps(50):
        x, w = mpmath.mpf(gap), mpmath.exp(old)
        k3, slope = mpmath.expm1(-x) + x, -mpmath.expm1(-x)
        exact = {"k1": (x, 1), "k2": (x * x / 2, x), "k3": (k3, slope), "k3_unbiased": (w * k3, w * (k3 + slope))}
        for kind, (value, derivative) in exact.items():
            current = min(gap, old, 0.0)
            rows = {"current": [current], "old": [current - old], "reference": [current - gap]}
            loss, (gradient,), _ = compute(kl_only(kind), torch.float64, 0.0, **rows)
            # The differences of log-probs are rounded.
            noise = 1e-13 * float(1 + abs(value) + w * (1 + abs(slope)))
            assert loss == pytest.approx(float(value), rel=1e-9, abs=noise)
            assert gradient == pytest.approx(float(derivative), rel=1e-9, abs=noise)


@pytest.mark.parametrize("name", PRESET_NAMES)
@CASES
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([5.0, 20.0, 60.0]))
def test_a_preset_is_its_formula_far_from_the_old_policy(name: str, seed: int, spread: float) -> None:
    answers = random_answers(seed, spread, count=3, longest=4)
    value, grads = reference.gradients(reference.OBJECTIVES[name], answers)
    got, found, _ = engine(preset(name), as_rows(answers))
    assert got == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(torch.cat(found), torch.cat(grads), rtol=1e-9, atol=1e-12)


REWARDS = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.integers(-5, 5).map(float))
NORMALIZE = ("std", "mean", "rloo", "batch", "batch_std")


@CASES
@given(rewards=st.lists(REWARDS, min_size=2, max_size=6), power=st.integers(-1000, 1000))
def test_rewards_of_any_size_give_the_advantages_of_their_ratios(rewards: list[float], power: int) -> None:
    """Rewards near 1e-200, as likelihoods are, have squares that are 0; those near 1e200 have none."""
    one = torch.tensor(rewards, dtype=torch.float64)
    other, groups = torch.tensor([math.ldexp(r, power) for r in rewards], dtype=torch.float64), torch.zeros(len(one))
    for kind in NORMALIZE:
        near, far = group_advantages(one, groups, kind), group_advantages(other, groups, kind)
        times = 0 if kind in ("std", "batch", "batch_std") else power
        assert far.tolist() == [math.ldexp(advantage, times) for advantage in near.tolist()], kind


@CASES
@given(data=st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2)), min_size=1))
def test_no_reward_gives_what_is_not_finite(data: list[tuple[float, int]]) -> None:
    groups = torch.tensor([group for _, group in data])
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        rewards = torch.tensor([reward for reward, _ in data], dtype=torch.float64).clamp(-largest, largest).to(dtype)
        for kind in NORMALIZE:
            got = group_advantages(rewards, groups, kind)
            assert bool(torch.isfinite(got).all()), kind
            assert "std" not in kind or float(got.abs().max()) <= len(data) ** 0.5 + 1e-6
        assert all(map(math.isfinite, group_metrics(rewards, groups).values()))


def test_kl_in_the_reward_is_finite() -> None:
    spec = ObjectiveSpec.preset("grpo").replace(kl="k3", kl_in="reward", kl_coefficient=0.1)
    old, below = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, 2000.0])
    charged = kl_in_reward(spec, old, below, torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))
    assert bool(torch.isfinite(charged).all()) and float(charged[0]) > 1e100
