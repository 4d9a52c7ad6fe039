"""Group advantages, length rules, the group filter, the divergence in the reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.objective import (
    ObjectiveSpec,
    group_advantages,
    group_metrics,
    is_trained,
    kl_in_reward,
    shape_rewards,
    soft_overlong_penalty,
)
from gspo_megatron.types import are_equal
from tests import reference
from tests.unit.objective.cases import EXAMPLES, as_rows, loss_inputs, random_answers, totals_of

SCORES = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])


@pytest.mark.parametrize("kind", ["std", "mean", "rloo", "batch", "batch_std", "maxrl"])
@pytest.mark.parametrize("ddof", [0, 1])
@EXAMPLES
@given(data=st.lists(st.tuples(SCORES, st.integers(-2, 3)), min_size=2, max_size=12))
def test_ragged_groups_in_any_order(kind: Any, ddof: int, data: list[tuple[float, int]]) -> None:
    rewards, groups = [r for r, _ in data], [g * 1000 for _, g in data]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), kind, ddof)
    assert got.tolist() == pytest.approx(reference.advantages(rewards, groups, kind, ddof), abs=1e-10)


@pytest.mark.parametrize("kind", ["std", "mean", "rloo", "batch_std", "maxrl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3])
def test_equal_rewards_and_single_answers_give_exactly_zero(kind: Any, dtype: torch.dtype, reward: float) -> None:
    """0.1 has a rounded mean: without care its group would get +-1."""
    rewards = torch.tensor([reward] * 7 + [0.5] + [1.0, 0.0], dtype=dtype)
    got = group_advantages(rewards, torch.tensor([3] * 7 + [8] + [5, 5]), kind)
    assert got.dtype == dtype
    assert got[:8].tolist() == [0.0] * 8
    assert got[8] > 0 > got[9]


def test_maxrl_is_the_gradient_of_the_log_pass_rate() -> None:
    """Of a policy with one parameter: sum of A grad log p over all outcomes, each as often as it comes up."""
    logit = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    rate = torch.sigmoid(logit)
    (wanted,) = torch.autograd.grad(rate.log(), logit, retain_graph=True)
    hits = torch.autograd.grad(rate.log(), logit, retain_graph=True)[0]
    misses = torch.autograd.grad((1 - rate).log(), logit)[0]
    many = 100_000
    rewards = torch.zeros(many, dtype=torch.float64)
    rewards[: round(many * float(rate))] = 1.0
    advantages = group_advantages(rewards, torch.zeros(many), "maxrl")
    got = (advantages * torch.where(rewards > 0, hits, misses)).mean()
    assert float(got) == pytest.approx(float(wanted), rel=1e-4)


def test_the_whole_batch_as_one_group() -> None:
    """REINFORCE++: by hand, (1, 1, 0, 0, 0) has mean 0.4 and deviation sqrt(0.24), whatever the groups are."""
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).double(), torch.tensor([3, 3, 3, 9, 9])
    high, low = 0.6 / 0.24**0.5, -0.4 / 0.24**0.5
    got = group_advantages(rewards, groups, "batch")
    assert got.tolist() == pytest.approx([high, high, low, low, low], abs=1e-14)
    assert group_advantages(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1]), "batch").tolist() == [0] * 4


def test_maxrl_refuses_a_negative_reward() -> None:
    with pytest.raises(ValueError, match=r"advantage=maxrl divides by the mean reward, and one is -0\.5"):
        group_advantages(torch.tensor([1.0, -0.5]), torch.tensor([0, 0]), "maxrl")


def test_rewards_may_be_integers_or_absent() -> None:
    assert group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0])).tolist() == [1, -1]
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64)).tolist() == []


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="normalize=zscore is not known; use std"):
        group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), "zscore")  # type: ignore[arg-type]


def test_length_rules() -> None:
    rewards, lengths = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([60, 90, 100])
    truncated = torch.tensor([False, False, True])
    spec = ObjectiveSpec.preset("dapo")

    def shaped(**axes: Any) -> tuple[list[float], list[bool]]:
        moved = spec.replace(**axes)
        result = shape_rewards(moved, rewards, lengths, truncated, torch.tensor([100, 100, 100]))
        return result.tolist(), [is_trained(moved, cut) for cut in truncated.tolist()]

    assert shaped() == ([1, 1, 0], [True, True, True])
    assert shaped(overlong="soft", overlong_buffer=20) == ([1, 0.5, -1], [True, True, True])
    assert shaped(overlong="filter") == ([1, 1, 0], [True, True, False])
    rewards = torch.tensor([1.0, 1.0, 0.7])
    assert shaped(overlong="zero") == ([1, 1, 0], [True, True, True])


def test_a_soft_penalty_needs_a_buffer_within_the_limit() -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer=200 must lie in 1\.\.100"):
        soft_overlong_penalty(torch.tensor([1, 1]), torch.tensor([300, 100]), 200)
    with pytest.raises(ValueError, match="overlong=soft has no overlong_buffer"):
        spec = ObjectiveSpec.preset("gspo").replace(overlong="soft")
        shape_rewards(spec, torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.bool), torch.tensor([10]))


def test_a_group_of_equal_rewards_is_what_dynamic_sampling_replaces() -> None:
    """The rule of the controller and of the metrics, on Python numbers, and that of the advantages, on a tensor."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.0, 1.0])
    groups = torch.tensor([7, 7, 7, 2, 2, 2, 5, 5, 9])
    advantages = group_advantages(rewards.double(), groups)
    for group, equal in ((7, False), (2, True), (5, True), (9, True)):
        assert are_equal(rewards[groups == group].tolist()) == equal
        assert bool((advantages[groups == group] == 0).all()) == equal
    logged = group_metrics(rewards, groups)
    assert logged["groups"] == 4 and logged["zero_variance_groups"] == 0.75
    assert logged["solved_groups"] == 0.25 and logged["unsolved_groups"] == 0.25
    assert logged["reward_mean"] == pytest.approx(3.3 / 9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergence_in_the_reward_is_summed_over_the_answer(kind: str) -> None:
    answers = random_answers(2)
    rows = as_rows(answers, seed=4)
    inputs = loss_inputs(rows, totals_of(rows))
    spec = ObjectiveSpec.preset("grpo").replace(kl=kind, kl_in="reward", kl_coefficient=0.1)
    assert inputs.reference_logprobs is not None and inputs.old_logprobs is not None
    got = kl_in_reward(spec, inputs.old_logprobs, inputs.reference_logprobs, inputs.loss_mask, inputs.cu_seqlens)
    for charge, answer in zip(got.tolist(), answers, strict=True):
        assert answer.reference is not None
        x = answer.old - answer.reference
        terms = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x}[kind]
        assert charge == pytest.approx(0.1 * float(terms.sum()), abs=1e-12)


def test_a_divergence_that_is_not_in_the_reward_charges_nothing_there() -> None:
    with pytest.raises(ValueError, match="kl_in=reward"):
        kl_in_reward(
            ObjectiveSpec.preset("grpo"), torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool),
            torch.tensor([0, 1]),
        )  # fmt: skip
