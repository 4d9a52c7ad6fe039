"""Intervals over a few seeds by the bootstrap, and the contrasts that claims are tested by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gspo_megatron.evaluation import estimates
from tools.study_summary import outcome

MOST_ENUMERATED = 6
"""Seeds up to which every resample is formed: 6^6 = 46,656. Above, random ones."""
SHARE = 0.025
"""Share of the resamples left out at each end."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]
    """One a seed."""
    mean: float
    interval: tuple[float, float] | None
    """95 %, percentiles of the bootstrap; None for one seed."""


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of the values of some seeds; None without one that is finite."""
    kept = tuple(value for value in values if math.isfinite(value))
    return Estimate(kept, fmean(kept), bootstrap(kept)) if kept else None


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile interval of the mean (Efron 1979): of all resamples with replacement, for a few values; None for one.

    With three seeds it is the range of the values, and with five it covers less than 95 %: the percentile interval is
    too narrow by about the root of (n - 1)/n.
    """
    count = len(values)
    if count < 2:
        return None
    if count > MOST_ENUMERATED:
        return estimates.bootstrap(values)
    means = sorted(fmean(drawn) for drawn in itertools.product(values, repeat=count))
    cut = math.floor(SHARE * len(means))
    return means[cut], means[-1 - cut]


Lookup = Callable[[str, str, int], Mapping[str, Any] | None]
"""Summary of (algorithm, setting, seed); None where it is not there."""


def contrast(
    terms: Mapping[str, float], metric: str, seeds: Sequence[int], lookup: Lookup, log10: bool = False
) -> Estimate | None:
    """A weighted sum of a metric over settings, for each seed that has all of them. Seeds share the cold start.

    Args:
        terms: weights by `ALGORITHM/SETTING`.
        metric: as `study_summary.outcome` knows it.
        seeds: that may count.
        lookup: finds summaries.
        log10: of the logarithm; a seed with a value of 0 does not count.
    """
    sums = []
    for seed in seeds:
        parts = []
        for name, weight in terms.items():
            algorithm, _, setting = name.partition("/")
            summary = lookup(algorithm, setting, seed)
            value = None if summary is None else outcome(summary, metric)
            if log10 and value is not None:
                value = math.log10(value) if value > 0 else None
            parts.append(None if value is None else weight * value)
        if None not in parts:
            sums.append(sum(part for part in parts if part is not None))
    return estimate(sums)
