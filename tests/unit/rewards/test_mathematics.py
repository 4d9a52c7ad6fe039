"""Golds and answers: what equals what, which part of a response counts, and no gold that fails against itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from gspo_megatron.rewards import mathematics
from gspo_megatron.rewards.answer_text import find_box, strip_thinking
from gspo_megatron.rewards.time_limit import OutOfTime

CASES = int(os.environ.get("GSPO_FUZZ", "1000")) // 10

EQUAL = [
    ("0.00001", "0.00001"),
    ("0.00001", "10^{-5}"),
    ("1e-05", "0.00001"),
    ("1e16", "10000000000000000"),
    ("1e22", "10^{22}"),
    ("1e400", "10^{400}"),
    ("72 dollars", "72"),
    ("72", "72 dollars."),
    ("72", "72\\text{ dollars}"),
    ("72", "\\$72"),
    ("72.", "72"),
    ("1 000", "1000"),
    ("1000", "1,000"),
    ("1000", "1\\,000"),
    ("5 million", "5000000"),
    ("5 percent", "5\\%"),
    ("50\\%", "50"),
    ("90^\\circ", "90"),
    ("6.63\\times10^{-34}", "6.63e-34"),
    ("6.63\\times10^{-34}", "6.63 \\cdot 10^{-34} \\text{ J s}"),
    ("(6.63\\times10^{-34}, 2)", "(6.63\\times10^{-34}, 2)"),
    ("1e-20,2", "2, 1e-20"),
    ("x > 6.63\\times10^{-34}", "(6.63e-34, \\infty)"),
    ("2 < x \\leq 3", "(2, 3]"),
    ("\u221a2", "\\sqrt{2}"),
    ("2\u221a(3)", "2\\sqrt{3}"),
    ("\u221b8", "2"),
    ("3\u00b74", "12"),
    ("\u00bdx", "\\frac{x}{2}"),
    ("\u03b1+1", "1+\\alpha"),
    ("1.000.000", "1000000"),
    ("1_000", "1000"),
    ("0x1F", "31"),
    ("0.333...", "1/3"),
    ("0.1(6)", "1/6"),
    ("1.2\u2026", "1.2\u2026"),
    ("90\\degree", "90"),
    ("\\boldsymbol{5}", "5"),
    ("\\textit{(B)}", "(B)"),
    ("\u22485", "5"),
    ("= 5", "5"),
    ("8/3", "2 2/3"),
    ("2 2/3", "\\frac83"),
    ("1/3", "0.333333"),
    ("\\frac{1}{2}", "0.5"),
    ("\\sqrt{2}", "1.41421356"),
    ("2", "\\sqrt{4}"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x^2+1", "1+x^2"),
    ("5 or 6", "6, 5"),
    ("1,2", "(1,2)"),
    ("Paris", "\\text{paris}"),
    ("(A)", "A"),
    ("B.", "B"),
    ("\\text{no solution}", "No solution"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]
DIFFERENT = [
    ("0.00001", "e-5"),
    ("1 000", "0"),
    ("6.63\\times10^{-34}", "1.6\\times10^{-19}"),
    ("6.63\\times10^{-34}", "0"),
    ("(6.63\\times10^{-34}, 2)", "(1.6\\times10^{-19}, 2)"),
    ("[1e-20, 2]", "[1e-21, 2]"),
    ("\\{1e-20, 2e-20\\}", "\\{1e-20, 3e-20\\}"),
    ("6.63\\times10^{-34} x", "1.6\\times10^{-19} x"),
    ("x=6.63\\times10^{-34}", "x=1.6\\times10^{-19}"),
    ("x > 6.63\\times10^{-34}", "x > 1.6\\times10^{-33}"),
    ("0x1F", "0"),
    ("1.000.000", "0"),
    ("1.000.000", "1"),
    ("1_000", "1"),
    ("(1, 2", "2"),
    ("\u00bdx", "\\frac{1}{2x}"),
    ("0.333...", "0.3"),
    ("x > 6.63\\times10^{-34}", "(1.6\\times10^{-33}, \\infty)"),
    ("2\\times10^{-30} < x < 3\\times10^{-30}", "2\\times10^{-30} < x < 4\\times10^{-30}"),
    ("(-\\infty, 2\\times10^{-30}) \\cup (1, \\infty)", "(-\\infty, 3\\times10^{-30}) \\cup (1, \\infty)"),
    ("0", "1e-9"),
    ("0.000123", "0.0001234"),
    ("12345678901234567890", "12345678901234567891"),
    ("9007199254740993", "9007199254740992"),
    ("1/3", "333333/1000000"),
    ("1/3", "0.33"),
    ("2", "2 2/3"),
    ("4/3", "2 2/3"),
    ("6", "2 3"),
    ("1 2 3", "6"),
    ("5", "5\\text{ million}"),
    ("Paris", "pairs"),
    ("hello world", "world hello"),
    ("2024-01-01", "2022"),
    ("-5", "5"),
    ("x>5", "x>6"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_an_equal_answer_scores_1(gold: str, answer: str) -> None:
    assert mathematics.score(gold, f"Thus \\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_another_answer_scores_0(gold: str, answer: str) -> None:
    assert mathematics.score(gold, f"Thus \\boxed{{{answer}}}") == 0.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{6}. Wait, no. Finally \\boxed{5}.", "5"),
        ("$\\boxed{6}$ and $\\boxed{5}$", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{5}, which I put in \\boxed{}", "5"),
        ("\\fbox{5}", "5"),
        ("$\\boxed 5$ it is", "5"),
        ("\\boxed{6}, or rather \\boxed{5", ""),
        ("\\boxedby 5", None),
        ("5", None),
    ],
)
def test_the_last_box_counts(text: str, content: str | None) -> None:
    assert find_box(text) == content


@pytest.mark.parametrize(
    ("text", "is_open", "rest"),
    [
        ("<think>\\boxed{5}</think> It is six.", False, " It is six."),
        ("\\boxed{5}</think> It is six.", True, " It is six."),
        ("\\boxed{5}, hm, on and on", True, ""),
        ("<think>\\boxed{5}, hm, on and on", False, ""),
        ("<think>a</think>b<think>c</think>d", False, "d"),
        ("no thinking", False, "no thinking"),
    ],
)
def test_thinking_does_not_count(text: str, is_open: bool, rest: str) -> None:
    assert strip_thinking(text, is_open=is_open) == rest


def test_without_a_box_the_last_expression_counts() -> None:
    assert mathematics.score("912", "The answer is 912.") == 1.0
    assert mathematics.score("2", "The answer is 2 2/3") == 0.0
    assert mathematics.score("8/3", "The answer is 2 2/3") == 1.0
    assert mathematics.score("6", "\\boxed{6}, no, \\boxed{7") == 0.0


@pytest.mark.parametrize("tower", ["9^{9^{9^{9}}}", "10^{10^{10}}"])
def test_a_tower_of_powers_ends(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "SECONDS", 0.2)
    try:
        assert mathematics.score("\\frac{1}{2}", f"\\boxed{{{tower}}}") == 0.0
    except OutOfTime as error:
        assert str(error) == "took more than 0.2 s"


def _numbers(draw: random.Random) -> tuple[str, str]:
    """A gold that is a number, and the same number changed."""
    digits, places = draw.randrange(1, 10**7), draw.randrange(0, 9)
    other = digits + draw.choice((-1, 1)) * (1 + digits // draw.randrange(1, 1000))
    sign, power = draw.choice(("", "-")), draw.randrange(-40, 40)
    write = draw.choice(
        (
            lambda n: f"{sign}{n}",
            lambda n: f"{sign}{n}.{'0' * places}",
            lambda n: f"{sign}{n / 1000:.3f}",
            lambda n: f"{sign}{n}e{power}",
            lambda n: f"{sign}{n}\\times 10^{{{power}}}",
            lambda n: f"{sign}{n:,}",
            lambda n: f"{sign}{n:,}".replace(",", "\\,"),
            lambda n: f"{sign}{n:,}".replace(",", " "),
            lambda n: f"{sign}\\frac{{{n}}}{{{places + 2}}}",
            lambda n: f"{n} {places + 1}/{places + 2}",
            lambda n: f"{sign}{n} dollars",
            lambda n: f"{sign}{n}\\text{{ cm}}",
            lambda n: f"\\${n}",
            lambda n: f"{n}\\%",
            lambda n: f"{sign}{n}.",
        )
    )
    return write(digits), write(other)


def _expressions(draw: random.Random) -> tuple[str, str]:
    """A gold that holds a number, and the same with the number changed."""
    form = draw.choice(
        (
            "({}, 2)",
            "\\{{{}, -1\\}}",
            "[-99999999999, {}]",
            "{}\\sqrt{{2}}",
            "{}x+1",
            "x={}",
            "{}\\pi",
            "x > {}",
            "{}, 7",
        )
    )
    number, other = draw.randrange(2, 10**6), draw.choice((1, 2, 10))
    if draw.random() < 0.3:
        return form.format(f"{number}\\times10^{{-30}}"), form.format(f"{number + other * number}\\times10^{{-30}}")
    return form.format(number), form.format(number + other)


@pytest.mark.parametrize("make", [_numbers, _expressions])
def test_every_gold_scores_1_against_itself_and_0_against_a_changed_number(
    make: Callable[[random.Random], tuple[str, str]],
) -> None:
    for seed in range(CASES if make is _numbers else CASES // 4):
        gold, other = make(random.Random(f"{make.__name__}/{seed}"))
        assert mathematics.score(gold, f"so \\boxed{{{gold}}}.") == 1.0, (seed, gold)
        assert mathematics.score(gold, f"so \\boxed{{{other}}}.") == 0.0, (seed, gold, other)
