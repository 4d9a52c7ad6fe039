"""Golds against answers, decided by mathematics: numbers, units, money, sets, matrices, words, expressions."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gspo_megatron.rewards import mathematics
from gspo_megatron.rewards.unit_text import read_unit
from tests.unit.rewards.fuzz_cases import CASES

EQUAL = [
    ("1.234.567", "1234567"), ("1_000", "1000"), ("0x10", "16"), ("0.333...", "1/3"), ("(-1,1)", "-1<x<1"),
    ("[0,1]", "0\\le x\\le 1"),
    ("5", "2+3"), ("5", "\\frac{10}{2}"), ("5", "x \\in \\{5\\}"), ("5", "4.\\overline{9}"), ("5", "|5|"), ("5", "05"),
    ("Grade 5", "grade 5"), ("\\text{Yes, }5", "\\text{yes, }5"), ("A", "a"), ("\\frac12", "1\\div 2"),
    ("5 cm", "5\\,\\text{cm}"), ("5\\text{ m/s}", "5"), ("5 m", "5"), ("12 km/h", "12"), ("9.8 m/s^2", "9.8"),
    ("3 \\text{ cm}^2", "3"), ("60 min", "60"), ("1 hour", "60 minutes"), ("2\\text{ hours}", "2 h"),
    ("20 apples", "20"), ("15 students", "15 students"), ("3 feet", "3\\text{ feet}"), ("10^\\circ C", "10"),
    ("25^{\\circ}", "25"), ("45 degrees", "45^\\circ"), ("90\xb0", "90"), ("30\xb0C", "30"), ("1,234,567", "1234567"),
    ("1234567", "1\u202f234\u202f567"), ("1 234 567", "1,234,567"), ("1{,}000", "1000"), ("1,000.50", "1000.5"),
    ("1'000'000", '1000000'), ("1,2,3", "1,2,3"), ("1, 2", "1,2"), ("100,200", "100200"), ("(100,200)", "(100, 200)"),
    ("50\\%", "0.5"), ("50%", "50"), ("0.5", "50\\%"), ("12.5\\%", "1/8"), ("100\\%", "1"), ("50 percent", "50\\%"),
    ("\\frac{3}{4}", "3/4"), ("\\dfrac34", "0.75"), ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("\\frac{1}{-2}", "-1/2"),
    ("\\frac{6}{4}", "3/2"), ("1\\frac{1}{2}", "1.5"), ("1\\frac12", "3/2"), ("-1\\frac{1}{2}", "-1.5"),
    ("-2 1/3", "-7/3"), ("\\frac{1}{3}", "0.3333333"), ("1/2/3", "1/6"), ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"), ("3:4", "3/4"), ("3:4", "3:4"), ("3 : 4", "3:4"),
    ("[0,1]", "[0, 1]"), ("(-\\infty, 2]", "(-\\infty,2]"), ("(-\\infty,2]", "x\\le 2"),
    ("(0,1)\\cup(2,3)", "(2,3)\\cup(0,1)"), ("[2,\\infty)", "[2,+\\infty)"), ("\\left[0,1\\right]", "[0,1]"),
    ("[-2, 3)", "[-2,3)"), ("(-3, 5)", "(-3,5)"), ("\\{1,2,3\\}", "\\{3,2,1\\}"), ("\\{1,2,2\\}", "\\{1,2\\}"),
    ("\\emptyset", "\\varnothing"), ("\\mathbb{R}", "\\mathbb{R}"), ("x=1,2", "1,2"),
    ("x=1 \\text{ or } x=2", "x=2, x=1"), ("\\{1\\}", "1"), ("\\pm 2", "-2,2"),
    ("2 \\pm \\sqrt{3}", "2+\\sqrt3, 2-\\sqrt3"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"),
    ("\\begin{pmatrix}0.5\\\\1\\end{pmatrix}", "\\begin{pmatrix}\\frac12\\\\1\\end{pmatrix}"), ("(2, -3)", "(2,-3)"),
    ("\\langle 1,2\\rangle", "\\langle 1,2\\rangle"), ("(\\frac12,3)", "(0.5,3)"), ("1.5e3", "1500"),
    ("1.5\\times 10^3", "1500"), ("1.5 x 10^3", "1500"), ("1.5\\cdot10^{3}", "1.5E3"), ("10^{-3}", "0.001"),
    ("10^{3}", "1000"), ("2^{10}", "1024"), ("2^{100}", "1267650600228229401496703205376"), ("100!", "100!"),
    ("5!", "120"), ("1e5", "100000"), ("\\binom{5}{2}", "10"), ("0", "-0"), ("-0.0", "0"), ("-3", "\u22123"),
    ("-3", "\u20133"), ("5", "+5"), ("-5", "- 5"), ("0", "0.000"), ("3", "-(-3)"), ("Yes", "yes"), ("True", "true"),
    ("A", "(A)"), ("A", "\\text{A}"), ("\\textbf{(C)}", "C"), ("Monday", "monday"),
    ("increasing", "\\text{Increasing}"), ("B", "b"), ("AB", "BA"), ("\\text{even}", "even"), ("none", "None."),
    ("3i", "3i"), ("(D)", "\\text{(D)}"), ("C", "\\mathrm{C}"), ("x^2-1", "(x-1)(x+1)"), ("2x+3", "3+2x"),
    ("\\log_2 8", "3"), ("\\sin^2 x+\\cos^2 x", "1"), ("y=2x+1", "2x+1"), ("y=2x+1", "y=1+2x"), ("x+y=3", "y=3-x"),
    ("e", "2.718281828"), ("\\pi", "3.14159265"), ("\\sqrt{8}", "2\\sqrt{2}"), ("\\sqrt[3]{8}", "2"),
    ("f(x)=x^2", "x^2"), ("\\infty", "\\infty"), ("x\\neq 2", "x\\neq 2"), ("x \\ge 3", "x\\geq 3"), ("x<2", "2>x"),
    ("5", "\\boxed{5}"), ("7", "x = \\boxed{7}"), ("\\boxed{7}", "7"), ("12", "\\textbf{12}"), ("12", "\\mathbf{12}"),
    ("12", "\\mathrm{12}"), ("12", "$12$"), ("12", "\\(12\\)"), ("12", "\\[12\\]"), ("12", "**12**"),
    ("12", "12\\text{.}"), ("3", "3 \\text{ (approx)}"), ("\\$5.50", "5.5"), ("$5", "5"), ("5 dollars", "\\$5"),
    ("\u20ac5", "5"), ("5\u20ac", "5"), ("\\$1,000", "1000"), ("$0.05", "5 cents"), ("\\$-5", "-5"), ("-\\$5", "-5"),
    ("USD 5", "5"), ("\xa35", "5"), ("3:30", "3:30"), ("3:30 PM", "3:30 pm"), ("1/2/2024", "1/2/2024"),
    ("0.1", "0.10"), ("0.30000000000000004", "0.3"), ("1.0", "1"), (".5", "0.5"), ("5.", "5"), ("007", "7"),
    ("1011_2", "11"), ("1011_2", "1011_2"), ("12_{10}", "12"), ("1011_2", "1011"), ("0.\\overline{3}", "1/3"),
    ("1.2\\overline{34}", "1.2\\overline{34}"), ("3.14159", "3.1415900001"), ("5 \\times 4", "20"),
    ("2 \\cdot 3", "6"), ("x>3", "(3,\\infty)"), ("36 km/h", "10 m/s"), ("5 square meters", "5 m^2"),
    ("5 cm^3", "5 cubic centimeters"), ("1 L", "1000 mL"), ("5m", "5"), ("5m", "5 m"), ("2x", "2 x"),
    ("5 in", "12.7 cm"), ("25^\\circ\\text{C}", "25"), ("60^\\circ", "60"),
    ("3 \\text{ apples}", "3 \\text{ oranges}"), ("5 million dollars", "\\$5000000"), ("\\$5 million", "5 million"),
    ("50\\text{ cents}", "\\$0.50"), ("5\\%", "5"), ("\xbd", "1/2"), ("2\xbd", "5/2"), ("x\xb2", "x^2"),
    ("10\u207b\xb3", "0.001"), ("2\u03c0", "2\\pi"), ("\u221e", "\\infty"), ("x \u2264 3", "x\\le 3"),
    ("\uff15", "5"), ("0.1\\overline{6}", "1/6"), ("-0.\\overline{3}", "-1/3"), ("0.\\overline{9}", "1"),
    ("FF_{16}", "255"), ("101_2", "5"), ("19_2", "19_2"), ("x_1=3", "x_1=3"), ("2\\sqrt 3", "2\\sqrt{3}"),
    ("\\frac 3 4", "0.75"), ("\\frac12", "0.5"), ("3 \\frac 12", "3.5"), ("5,000 \\text{ people}", "5000"),
    ("2 \\text{ and } 3", "2, 3"), ("2 \\text{ or } 3", "3,2"),
    ("n\\pi, n \\in \\mathbb{Z}", "n\\pi, n \\in \\mathbb{Z}"), ("7!", "5040"), ("|-3|", "3"),
    ("\\lfloor 3.7\\rfloor", "3"), ("\\text{Alice}", "Alice"), ("5^{2}", "25"), ("(-5)^2", "25"),
    ("\\text{(A) and (C)}", "(A), (C)"), ("\\frac{0}{1}", "0"), ("0.5\\pi", "\\frac{\\pi}{2}"),
    ("\\cos 60^\\circ", "0.5"), ("\\sin 30^\\circ", "1/2"), ("\\log_{10} 100", "2"), ("\\lg 100", "2"),
    ("\\gcd(4,6)", "2"), ("5 \\mod 3", "2"), ("\\sum_{k=1}^{3} k", "6"), ("\\int_0^1 x dx", "1/2"), ("y = 3", "3"),
    ("x = 3, y = 4", "(3,4)"), ("(x,y)=(3,4)", "(3,4)"), ("\\triangle ABC", "\\triangle ABC"), ("90\\deg", "90"),
    ("\\$1.50", "1.5 dollars"),
]  # fmt: skip
DIFFERENT = [
    ("5", "5 \\lor 6"), ("6", "5 \\lor 6"), ("5", "5 \\text{ or } 6"), ("5", "5 \\ne 6"),
    ("500", "5\\%"), ("(1,2)", "\\{2,1\\}"), ("[1,2]", "\\{1,2\\}"), ("5", "5 < 6"), ("5", "5; 6"), ("5", "5 \\pm 1"),
    ("100 km", "100 m"), ("5 kg", "5 g"), ("12,34", "1234"), ("10,000", "10"),
    ("100, 200", "100,200"), ("5\\%", "0.5"), ("33.3\\%", "1/3"), ("\\tfrac{22}{7}", "3.14159"),
    ("\\frac{2}{3}", "0.667"), ("1:2", "2:1"), ("[0,1]", "(0,1)"), ("[0,1)", "[0,1]"), ("(0,1)\\cup(2,3)", "(0,3)"),
    ("(1,2)", "(2,1)"), ("\\{1,2\\}", "\\{1,2,3\\}"), ("\\emptyset", "\\{0\\}"), ("\\mathbb{R}", "\\mathbb{Z}"),
    ("1,2", "1"), ("\\pm 2", "2"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"), ("(1,2,3)", "(1,2)"),
    ("(3,4)", "(4,3)"), ("3\\times10^8", "3\\times10^{9}"), ("6.02\\times 10^{23}", "6.022\\times10^{23}"),
    ("1e-10", "0"), ("2^{100}", "1267650600228229401496703205377"), ("1E5", "e5"), ("-3", "3"), ("0", "0.0000001"),
    ("-3", "--3"), ("yes", "no"), ("A", "B"), ("(C) 12", "C"), ("Monday", "Tuesday"), ("not possible", "possible"),
    ("John", "John Smith"), ("ABC", "CBA"), ("even", "odd"), ("x", "y"), ("cat dog", "catdog"), ("i", "-i"),
    ("1+i", "1-i"), ("2x+3", "2y+3"), ("\\ln 2", "\\log 2"), ("y=2x+1", "x=2y+1"), ("\\pi", "3.14"), ("\\pi", "22/7"),
    ("|x|", "x"), ("a^2", "a"), ("\\infty", "-\\infty"), ("x\\neq 2", "x\\neq 3"), ("x>3", "x\\ge 3"),
    ("5 cents", "5 dollars"), ("3:30", "4:30"), ("2024-01-01", "2024-01-02"),
    ("123456789012345678901234567890", "123456789012345678901234567891"), ("0.\\overline{3}", "0.3"),
    ("3.14159", "3.14160"), ("1000000.1", "1000000.2"), ("10 \\pmod{7}", "3"), ("(-\\infty,2]", "x< 2"),
    ("(-1,1)", "-1\\le x<1"), ("x>3", "[3,\\infty)"), ("(1,2)", "x=1"), ("\\{1,2\\}", "x=1"), ("x^2+y^2=1", "1"),
    ("5 m/s", "5 km/h"), ("5\\text{ m}^2", "5\\text{ m}"), ("5 m", "5 n"), ("2x", "2"),
    ("98.6^\\circ F", "98.6^\\circ C"), ("45^\\circ", "45 \\text{ radians}"), ("FF_{16}", "FF"), ("101_2", "6"),
    ("101_2", "101_3"), ("a_1", "a_2"), ("1,5", "1.5"), ("\\frac{a}{b}", "\\frac{b}{a}"), ("3.7", "3.70001"),
    ("12:30", "12:30 PM"), ("-5^2", "25"), ("1e309", "1e308"), ("5", ""), ("5", " "), ("two", "2"),
    ("\\frac{1}{0}", "\\infty"), ("1/0", "0"), ("\\frac{22}{7}", "\\pi"), ("x = 3, y = 4", "x=4, y=3"),
    ("\\overrightarrow{AB}", "AB"), ("10\\text{ dollars}", "10 euros"),
]  # fmt: skip
LIMITS = [
    ("7", "\\text{The answer is }7"),  # words may change what follows: "not 7"
    ("2(3)", "6"),  # f(3), too, is a name before a bracket
    ("3 \\pmod 7", "3"),  # a class of numbers
    ("\\sqrt{-1}", "i"),  # i is a name to math-verify
    ("e^{i\\pi}", "-1"),
    ("\\frac{\\pi}{4}", "45^\\circ"),  # degrees and radians: units of angles are not converted by pi
]
"""Equal, and not found to be: what a recipe's golds should not need."""


NAMES = [("2R", "2r"), ("x+Y", "X+y")]
"""Different, and held for equal: math-verify reads names without their case."""


def wrong(pairs: list[tuple[str, str]], score: float) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, answer in pairs if mathematics.score(gold, f"Thus \\boxed{{{answer}}}.") != score]


def test_equal_answers_score_1() -> None:
    assert len(EQUAL) > 100 and not wrong(EQUAL, 1.0)


def test_other_answers_score_0() -> None:
    assert len(DIFFERENT) > 60 and not wrong(DIFFERENT, 0.0)


def test_the_limits_are_where_the_readme_says() -> None:
    assert not wrong(LIMITS, 0.0) and not wrong(NAMES, 1.0), (
        "better than its documentation: move the pair, and correct rewards/README.md"
    )


def test_every_gold_scores_1_against_itself() -> None:
    golds = {gold for gold, _ in EQUAL + DIFFERENT + LIMITS}
    assert not [gold for gold in golds if mathematics.score(gold, mathematics.box(gold)) != 1.0]


UNITS = [
    ["mm", "cm", "m", "km", "in", "ft", "yd", "mi", "meters", "kilometers", "inches", "feet", "miles"],
    ["mg", "g", "kg", "lb", "oz", "grams", "kilograms", "ounces"],
    ["ms", "s", "min", "h", "days", "weeks", "seconds", "minutes", "hours"],
    ["mL", "L", "liters", "milliliters"],
    ["m/s", "km/h", "mi/h", "meters per second", "cm/s", "ft/min"],
    ["m^2", "cm^2", "square meters", "square feet", "km^2"],
    ["dollars", "cents", "USD"],
]


@pytest.mark.parametrize("write", ["{} \\text{{ {}}}", "{} {}", "{}\\,\\mathrm{{{}}}"])
def test_a_length_in_another_unit_is_equal_exactly_when_it_is_as_long(write: str) -> None:
    for seed in range(CASES):
        draw = random.Random(f"{write}/{seed}")
        kind = draw.choice(UNITS)
        here, there = draw.choice(kind), draw.choice(kind)
        first, second = read_unit(here), read_unit(there)
        assert first and second and first.dimension == second.dimension, (here, there)
        number = draw.randrange(1, 10_000)
        same = number * first.factor / second.factor
        gold, equal = (
            write.format(number, here),
            write.format(f"\\frac{{{same.numerator}}}{{{same.denominator}}}", there),
        )
        other = write.format(f"\\frac{{{same.numerator + 1}}}{{{same.denominator}}}", there)
        foreign = write.format(number, draw.choice(draw.choice([units for units in UNITS if units is not kind])))
        assert mathematics.score(gold, f"\\boxed{{{equal}}}") == 1.0, (seed, gold, equal)
        assert mathematics.score(gold, f"\\boxed{{{other}}}") == 0.0, (seed, gold, other)
        assert mathematics.score(gold, f"\\boxed{{{foreign}}}") == 0.0, (seed, gold, foreign)
        assert mathematics.score(gold, f"\\boxed{{{number}}}") == 1.0, "the unit may be left out"


def _base(draw: random.Random) -> tuple[str, str, str]:
    base, number = draw.randrange(2, 11), draw.randrange(1, 10_000)
    digits, left = "", number
    while left:
        digits, left = f"{left % base}{digits}", left // base
    return f"{digits}_{{{base}}}", str(number), str(number + 1)


def _repeating(draw: random.Random) -> tuple[str, str, str]:
    whole, once, again = draw.randrange(100), draw.choice(["", "0", "12"]), str(draw.randrange(1, 999))
    under = (10 ** len(again) - 1) * 10 ** len(once)
    over = int(f"{whole}{once}") * (10 ** len(again) - 1) + int(again)
    return f"{whole}.{once}\\overline{{{again}}}", f"{over}/{under}", f"{over + 1}/{under}"


@pytest.mark.parametrize("make", [_base, _repeating])
def test_bases_and_repeated_digits_are_exact(make: Callable[[random.Random], tuple[str, str, str]]) -> None:
    for seed in range(CASES):
        gold, equal, other = make(random.Random(f"{make.__name__}/{seed}"))
        assert mathematics.score(gold, f"\\boxed{{{equal}}}") == 1.0, (seed, gold, equal)
        digits = gold.partition("_")[0]
        assert other == digits or mathematics.score(gold, f"\\boxed{{{other}}}") == 0.0, (seed, gold, other)
