"""Nearness by ratio of what math-verify holds for equal: it compares six decimals, and 1e-34 has none."""

from __future__ import annotations

from math import isfinite
from typing import Any

RELATIVE = 1e-5
"""Largest difference of equal numbers over the larger one."""
_DIGITS = 30


def is_near(wanted: Any, found: Any) -> bool:
    """Whether each number in one expression is near the one in its place in the other; True where there are none."""
    from sympy.core.relational import Eq
    from sympy.logic.boolalg import Boolean

    if isinstance(wanted, Eq) and isinstance(found, Eq):
        return wanted.lhs != found.lhs or is_near(wanted.rhs, found.rhs)
    wanted, found = (side.rhs if isinstance(side, Eq) else side for side in (wanted, found))
    wanted, found = (_solution(side) if isinstance(side, Boolean) else side for side in (wanted, found))
    if wanted is None or found is None:
        return True
    members = [_members(side) for side in (wanted, found)]
    if members == [None, None]:
        return _is_near_number(wanted, found)
    first, second = ([side] if parts is None else parts for side, parts in zip((wanted, found), members, strict=True))
    return len(first) == len(second) and _pair_up(first, second)


def _solution(relation: Any) -> Any:
    """The numbers that a relation of one symbol admits; None = math-verify's verdict on it counts."""
    if len(relation.free_symbols) != 1:
        return None
    try:
        return relation.as_set()
    except (NotImplementedError, TypeError, ValueError, AttributeError):  # no inequality that sympy solves
        return None


def _members(side: Any) -> list[Any] | None:
    """What a set, a union, a tuple, an interval or a matrix is made of; None for anything else."""
    from sympy import FiniteSet, Interval, MatrixBase, Tuple, Union

    if isinstance(side, Interval):
        return [side.start, side.end]
    if isinstance(side, MatrixBase):
        return list(side.flat())
    return list(side.args) if isinstance(side, FiniteSet | Tuple | Union) else None


def _pair_up(wanted: list[Any], found: list[Any]) -> bool:
    """Whether each member is near another one; math-verify has seen to their order."""
    left = list(found)
    for member in wanted:
        near = next((index for index, other in enumerate(left) if is_near(member, other)), None)
        if near is None:
            return False
        del left[near]
    return True


def _is_near_number(wanted: Any, found: Any) -> bool:
    """Compare values; free symbols take sample values, at which equal expressions have equal values."""
    symbols = sorted(getattr(wanted, "free_symbols", set()) | getattr(found, "free_symbols", set()), key=str)
    sample = {symbol: (2 * index + 3) / 7 for index, symbol in enumerate(symbols)}
    try:
        first, second = (complex(side.subs(sample).evalf(_DIGITS)) for side in (wanted, found))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True  # words, or sets without a list of members
    if first != first or second != second:
        return True
    largest = max(abs(first), abs(second))
    return first == second or (isfinite(largest) and abs(first - second) <= RELATIVE * largest)
