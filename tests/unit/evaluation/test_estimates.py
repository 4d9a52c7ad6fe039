"""avg@n and pass@k against their definitions, and intervals against what they promise."""

from __future__ import annotations

import math
import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.evaluation.estimates import bootstrap, estimate, exact_binomial, pass_at_k, sizes

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)


@CASES
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(responses: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(responses)))
    subsets = list(combinations(responses, k))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(len(responses), sum(responses), k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all outcomes of n responses is the chance that k fresh ones hold a right one."""
    n, chance = 8, 0.3
    for k in (1, 2, 5, 8):
        mean = sum(math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_of_many_responses_is_finite() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


def test_the_sizes_are_powers_of_two_and_all() -> None:
    assert [sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_an_evaluation_worked_by_hand() -> None:
    right = np.array([[True, True], [True, False], [False, False], [False, False]])
    rewards = np.where(right, 1.0, 0.25)
    found = {one.name: one for one in estimate(rewards, right)}
    assert list(found) == ["avg@2", "pass@1", "pass@2", "mean reward"]
    assert [one.value for one in found.values()] == [0.375, 0.375, 0.5, 0.53125]
    assert [one.method for one in found.values()] == [
        "bootstrap over problems", "bootstrap over problems", "exact binomial", "bootstrap over problems",
    ]  # fmt: skip
    for one in found.values():
        assert one.low < one.value < one.high


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Clopper and Pearson's limits at 95 %, from the quantiles of the beta distribution.
    [(0, 5, 0.0, 0.521824), (5, 5, 0.478176, 1.0), (3, 10, 0.066740, 0.652453), (1, 1, 0.025, 1.0)],
)
def test_the_exact_interval_has_the_published_limits(successes: int, trials: int, low: float, high: float) -> None:
    assert exact_binomial(successes, trials) == pytest.approx((low, high), abs=1e-6)


def test_the_exact_interval_holds_the_share_often_enough() -> None:
    for trials in (5, 17, 60):
        intervals = [exact_binomial(successes, trials) for successes in range(trials + 1)]
        for share in (0.02, 0.3, 0.5, 0.9):
            covered = sum(
                math.comb(trials, c) * share**c * (1 - share) ** (trials - c)
                for c, (low, high) in enumerate(intervals)
                if low <= share <= high
            )
            assert covered >= 0.95


def test_the_bootstrap_resamples_problems_with_all_their_responses() -> None:
    """Responses to a problem are alike: 16 of each of 50 problems are as good as 50 values, not as 800."""
    values = np.random.default_rng(1).random(50)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(50), rel=0.05)
    repeated = np.repeat((values > 0.5)[:, None], 16, axis=1)
    (average, *_) = estimate(repeated.astype(float), repeated)
    assert average.method == "exact binomial" and average.high - average.low > 0.25
    assert bootstrap(values) == (low, high), "the same values give the same interval"
