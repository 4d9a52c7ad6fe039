"""avg@n and pass@k over problems, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Share of repetitions of the whole evaluation whose interval would hold the true value."""
RESAMPLES = 10_000
BLOCK_VALUES = 1 << 22
"""Values that the bootstrap holds at one time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems."""

    name: str
    """`avg@8`, `pass@4`, `mean reward`."""
    value: float
    low: float
    high: float
    method: str
    """How the interval was made: `exact binomial` or `bootstrap over problems`."""


def estimate(rewards: np.ndarray, right: np.ndarray) -> list[Estimate]:
    """All estimates of an evaluation.

    Args:
        rewards: [problems, answers] scores.
        right: [problems, answers] bool, whether a response has the highest score.
    """
    answers = right.shape[1]
    found = [_with_interval(f"avg@{answers}", right.mean(axis=1))]
    counts = right.sum(axis=1)
    for k in sizes(answers):
        found.append(_with_interval(f"pass@{k}", np.array([pass_at_k(answers, int(c), k) for c in counts])))
    found.append(_with_interval("mean reward", rewards.mean(axis=1)))
    return found


def sizes(answers: int) -> list[int]:
    """The k of pass@k that are reported: powers of two, and the number of responses itself."""
    return sorted({*(1 << power for power in range(answers.bit_length()) if 1 << power <= answers), answers})


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Chance that at least one of k responses is right, drawn without replacement from those that there are.

    1 - C(n - c, k) / C(n, k) for c right ones of n. Its mean is 1 - (1 - p)^k for every k <= n, where 1 - (1 - c/n)^k
    is too low. Source: Chen et al. 2021, arXiv 2107.03374, equation 1.

    Args:
        answers: n.
        right: c, at most n.
        k: at most n.
    """
    # Integers of any length: exact until the division.
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def _with_interval(name: str, values: np.ndarray) -> Estimate:
    """The mean of one value a problem.

    Values of 0 and 1 make a binomial count, whose interval is exact and has a width also where all are equal. Others
    are resampled, a problem with all its responses at a time, because responses to one problem are alike.

    Args:
        values: [problems].
    """
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return Estimate(name, mean, *exact_binomial(int(values.sum()), len(values)), "exact binomial")
    return Estimate(name, mean, *bootstrap(values), "bootstrap over problems")


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval of the mean; the same values give the same interval.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Args:
        values: [problems].
        resamples: draws of as many problems.
    """
    values, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    block = max(1, BLOCK_VALUES // len(values))
    means = [
        values[generator.integers(len(values), size=(min(block, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def exact_binomial(successes: int, trials: int) -> tuple[float, float]:
    """Interval of a share by inverting the binomial test. Source: Clopper and Pearson 1934, Biometrika 26.

    Args:
        successes: at most `trials`.
        trials: at least 1.
    """
    tail, facts = (1 - LEVEL) / 2, np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    counts = np.arange(trials + 1)
    logs = facts[trials] - facts - facts[::-1]  # of the binomial coefficients

    def at_most(most: int, share: float) -> float:
        with_share = logs + counts * math.log(share) + (trials - counts) * math.log1p(-share)
        return float(np.exp(with_share[: most + 1]).sum())

    low = 0.0 if successes == 0 else _solve(lambda share: 1 - at_most(successes - 1, share) < tail)
    high = 1.0 if successes == trials else _solve(lambda share: at_most(successes, share) > tail)
    return low, high


def _solve(is_below: Callable[[float], bool]) -> float:
    """The share at which a monotonous condition ends, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
