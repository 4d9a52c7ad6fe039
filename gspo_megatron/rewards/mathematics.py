"""Mathematical equality with the reference answer: numbers exactly, everything else by math-verify."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from gspo_megatron.rewards.answer_text import find_box
from gspo_megatron.rewards.number_text import ReadNumber, read_number, unwrap
from gspo_megatron.rewards.relative import RELATIVE, is_near
from gspo_megatron.rewards.time_limit import limit_time

TAIL_CHARACTERS = 10_000
"""Only this many characters at the end of a response are searched: the time grows with their square."""
SECONDS = 3.0
"""Processor time for one response: `9^{9^{9}}` would never end."""
HALF_A_MILLIONTH = 5e-7
"""Largest difference of equal numbers of which one is a decimal: math-verify's six decimals."""

_SCIENTIFIC = re.compile(r"(?<![\w\\.])((?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d+)(?![\w.])")
_MIXED = re.compile(r"(?<![\w.])(\d+)[ ]+(\d+)/(\d+)(?![\w.])")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w*\}|\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_OPERATOR = re.compile(r"\\(?!(?:text|textrm|mathrm|mbox|quad|qquad)(?![a-zA-Z]))[a-zA-Z]")
_AND = re.compile(
    r"\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}\s*|\s*\\(?:lor|land)(?![a-zA-Z])\s*|,?\s+(?:and|or)\s+"
)
_UNREAD = {
    r"\\varnothing(?![a-zA-Z])": r"\\emptyset",
    r"\\lg(?![a-zA-Z])": r"\\log_{10}",
    # An angle in degrees within a function: math-verify leaves the sign of a degree out.
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z]))\s*[({]?\s*(\d+(?:\.\d+)?)"
    r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*[)}]?": r"\1(\2\\pi/180)",
}
"""LaTeX that math-verify does not read -> what it does."""
_FUNCTIONS = "arccos arcsin arctan cosh infinity infty sinh sqrt tanh alpha beta gamma delta theta lambda sigma omega"
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def load() -> None:
    """Import math-verify, and all that it imports, before the first response is scored."""
    from math_verify import parse, verify

    # It logs the whole response whenever it fails to parse one.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # The grammar is read with the first expression: seconds of processor time that are no response's.
    verify(
        parse("\\boxed{\\frac{1}{2}}", parsing_timeout=0),
        parse("\\boxed{0.5}", parsing_timeout=0),
        timeout_seconds=None,
    )


def score(gold: str, answer: str) -> float:
    """Return 1 if an answer equals the gold answer, else 0. The last `\\boxed{}` counts, else the last expression.

    Raises:
        OutOfTime: reading or comparing them takes too long.
    """
    content = find_box(answer)
    with limit_time(SECONDS):
        if content is not None:
            return float(_equals_box(gold, content))
        if (number := read_number(answer)) is not None:
            return float(_equals_number(gold, number))
        return float(_equals_expression(gold, _rewrite(answer[-TAIL_CHARACTERS:])))


def is_text(gold: str) -> bool:
    """Whether a gold answer is compared letter by letter: it is no number, and math-verify would misread it."""
    return not is_number(gold) and _is_text(_AND.sub(", ", unwrap(_content(gold))))


def is_number(gold: str) -> bool:
    """Whether a gold answer is a number, which is read exactly."""
    return read_number(_content(gold)) is not None


def is_unread(gold: str) -> bool:
    """Whether math-verify reads nothing of a gold answer that is no number: it is compared letter by letter.

    Raises:
        OutOfTime: reading it takes too long.
    """
    with limit_time(SECONDS):
        return all(isinstance(part, str) for part in _parse_gold(gold))


def box(gold: str) -> str:
    """Return a gold answer as a response gives it: in a box."""
    return gold if find_box(gold) is not None else f"\\boxed{{{gold}}}"


def _equals_box(gold: str, content: str) -> bool:
    if (number := read_number(content)) is not None:
        return _equals_number(gold, number)
    bare, wanted = unwrap(content), unwrap(_content(gold))
    if _as_text(bare) == _as_text(wanted):
        return bool(bare)
    bare, wanted = (_AND.sub(", ", text) for text in (bare, wanted))
    if _is_text(wanted) or _is_text(bare):
        return False
    return _equals_expression(gold, f"\\boxed{{{_rewrite(bare)}}}")


def _equals_number(gold: str, number: ReadNumber) -> bool:
    """Whether a number equals the gold answer; one that is no number itself is evaluated."""
    wanted = read_number(_content(gold))
    if wanted is None:
        if _is_text(unwrap(_content(gold))):
            return False
        written = f"\\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
        return _equals_expression(gold, f"\\boxed{{{written}}}", number.is_decimal)
    if wanted.unit and number.unit:
        # Both say what they count: in the gold answer's unit.
        if wanted.unit.dimension != number.unit.dimension:
            return False
        number = replace(number, value=number.value * number.unit.factor / wanted.unit.factor)
    if (wanted.digits is None) != (number.digits is None) and wanted.value != number.value:
        # The base is left out, as a unit may be: digits are compared.
        return (wanted.digits or wanted.value) == (number.digits or number.value)
    if wanted.value == number.value:
        return True
    difference = abs(wanted.value - number.value)
    return (
        (wanted.is_decimal or number.is_decimal)
        and difference <= HALF_A_MILLIONTH
        and difference <= RELATIVE * max(abs(wanted.value), abs(number.value))
    )


def _equals_expression(gold: str, text: str, is_decimal: bool = False) -> bool:
    """Whether math-verify finds the gold answer in a text, and numbers in it are near by their ratio too."""
    from math_verify import parse, verify

    found = parse(text, parsing_timeout=0)
    if is_decimal:
        found = [part.evalf(30) if not isinstance(part, str) else part for part in found]
    return any(
        verify(wanted, part, timeout_seconds=None, allow_set_relation_comp=True)
        and (isinstance(wanted, str) or is_near(wanted, part))
        for wanted in _parse_gold(gold)
        for part in found
    )


@lru_cache(maxsize=256)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{_rewrite(unwrap(_content(gold)))}}}", parsing_timeout=0))


def _content(gold: str) -> str:
    """A gold answer may be given in a box."""
    content = find_box(gold)
    return gold if content is None else content


def _rewrite(text: str) -> str:
    """Write numbers as math-verify reads them: 1e22 is to it the product of 1, e and 22; 2 2/3 is 4/3."""
    for wrong, right in _UNREAD.items():
        text = re.sub(wrong, right, text)
    return _MIXED.sub(r"(\1+\2/\3)", _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text))


def _as_text(bare: str) -> str:
    """For a comparison letter by letter: without commands of fonts, case and spacing."""
    text = re.sub(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}|\\[,;:! ]", r" \1 ", bare).lower()
    return re.sub(r"(?<=\d) (?=[a-z])", "", " ".join(text.split()))


def _is_text(bare: str) -> bool:
    """Whether an answer is words: math-verify would take each letter for a variable, and a date for a difference."""
    outside = _COMMAND.sub(" ", bare)
    words = [word for word in re.findall(r"[A-Za-z]{4,}", outside) if word.lower() not in _FUNCTIONS.split()]
    # What is between numbers is an operator where there is a command: `5 \\times 4`.
    numbers = re.search(r"\d\s+\d", outside) and not _MIXED.search(outside) and not _OPERATOR.search(bare)
    # Points and orders: ABC is not CBA. AB is BA, a segment or a product.
    letters = re.fullmatch(r"[A-Z]{3,}", bare)
    # Of half a pair or an interval math-verify reads a part.
    brackets = [sum(bare.count(sign) for sign in signs) for signs in ("([", ")]")]
    return bool(words or numbers or letters or _DATE.search(outside) or brackets[0] != brackets[1])
