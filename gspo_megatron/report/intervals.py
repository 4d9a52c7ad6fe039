"""Intervals of 95 % for what a run and several seeds measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance

Z = 1.959963984540054
"""Standard deviations of a normal distribution that hold 95 % on both sides."""
STUDENT = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622, 10: 2.2281,
    12: 2.1788, 15: 2.1314, 20: 2.0860, 30: 2.0423, 60: 2.0003, 120: 1.9799,
}  # fmt: skip
"""Quantiles of Student's t at 97.5 %, by degrees of freedom."""


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


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean of a few runs, by Student's t; None for one run."""
    if len(values) < 2:
        return None
    spread = _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - spread, fmean(values) + spread


def of_difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the difference of two means over seeds, by Welch's t; None where a side has one run."""
    if min(len(values), len(base)) < 2:
        return None
    sides = (values, base)
    parts = [variance(side) / len(side) for side in sides]
    total = sum(parts)
    # Welch-Satterthwaite.
    shares = sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    freedom = int(total**2 / shares) if shares > 0 else 1
    middle, spread = fmean(values) - fmean(base), _quantile(freedom) * math.sqrt(total)
    return middle - spread, middle + spread


def _quantile(freedom: int) -> float:
    """Of Student's t at 97.5 %; degrees of freedom between two of the table count as the smaller."""
    return STUDENT[max(one for one in STUDENT if one <= max(freedom, 1))]
