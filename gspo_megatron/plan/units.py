"""Format numbers for people, and values as a recipe takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def si(value: float, unit: str) -> str:
    """Format with four digits and a decimal prefix up to P: `52.11 GB`, `1323 PFLOP`."""
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), _PREFIXES[-1])
    return f"{value / scale:.4g} {prefix}{unit}".rstrip()


def count(value: float) -> str:
    """Format a number of parameters: `30.53 B`, `1.8 M`."""
    return si(value, "").replace(" G", " B")


def size(value: float) -> str:
    """Format bytes to a tenth: `52.1 GB`."""
    scale, prefix = next(((s, p) for s, p in _PREFIXES[2:] if abs(value) >= s), _PREFIXES[-1])
    return f"{value / scale:,.1f} {prefix}B"


def seconds(value: float) -> str:
    """Format seconds: `0.4 s`, `1,402 s`."""
    return f"{value:,.1f} s" if value < 10 else f"{value:,.0f} s"


def between(value: float, factors: tuple[float, float], unit: str) -> str:
    """Format the range of an estimate with three digits: `684 to 1,070 s`."""
    low, high = (value * factor for factor in factors)
    return f"{_three(low)} to {_three(high)} {unit}"


def _three(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def many(count: int, noun: str) -> str:
    """Format a count with its noun: `1 rank`, `8 ranks`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def value_text(value: Any) -> str:
    """Format a value as a recipe and an override take it: `true` and `null`, not `True` and `None`."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)


def overrides_text(change: Mapping[str, Any]) -> str:
    """Format keys and values as a command line takes them."""
    return " ".join(f"{key}={value_text(value)}" for key, value in change.items())
