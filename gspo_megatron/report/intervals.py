"""Intervals of 95 % for what a run and several seeds measure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

Z = 1.959963984540054
"""Standard deviations of a normal distribution that hold 95 % on both sides."""
RESAMPLES = 2000


def wilson(share: float, count: float) -> tuple[float, float]:
    """Interval of a share (Wilson 1927).

    Args:
        share: that was seen, in [0, 1].
        count: independent trials. Several responses to a problem count as one: an interval that is too wide, not too
            narrow.
    """
    if count <= 0:
        return 0.0, 1.0
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    middle, scale = share + Z * Z / (2 * count), 1 + Z * Z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def of_mean(mean: float, deviation: float, count: float) -> tuple[float, float]:
    """Interval of a mean of independent values with this standard deviation, by the normal distribution."""
    spread = Z * deviation / math.sqrt(max(count, 1.0))
    return mean - spread, mean + spread


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile interval of the mean over seeds (2,000 resamples, always the same ones); None below 3 seeds."""
    if len(values) < 3:
        return None
    chance = random.Random(0)
    means = sorted(fmean(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]
