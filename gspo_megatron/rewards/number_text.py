"""Numbers as people write them in answers, read exactly: `1 000`, `72 dollars`, `6.63\\times10^{-34}`, `2 2/3`."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from gspo_megatron.rewards.unit_text import Unit, are_symbols, read_unit

MOST_DIGITS = 1000
"""A number with more digits, or an exponent beyond it, is not read: its exact value would take long to compute."""

_GAP = r"(?:\\[,;:! ]|\{,\}|[ ~,'_\u00a0\u2009\u202f])"
_DIGITS = rf"(?:\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)|\d+)"
_DECIMAL = rf"(?:\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d)|{_DIGITS}(?:\.\d*)?|\.\d+)"
_TEN = r"10\s*(?:\^|\*\*)\s*[{(]?\s*(?P<p>[+-]?\d+)\s*[)}]?"
_POWER = rf"(?:[eE](?P<e>[+-]?\d+)|\s*(?:\\times|\\cdot|\*|x|\u00d7|\u00b7)\s*{_TEN})"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_DECIMAL})(?:{_POWER})?")
_POWER_OF_TEN = re.compile(rf"(?P<sign>[+-]?)\s*{_TEN}")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+|(?=\\)))?(?:\\[dt]?frac\s*"
    rf"(?:\{{\s*(?P<a>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<b>{_DECIMAL})\s*\}}|(?P<c>\d)\s*(?P<d>\d))"
    rf"|(?P<f>{_DECIMAL})\s*/\s*(?P<g>{_DECIMAL}))"
)
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>\d*)\.(?P<once>\d*?)(?:\\overline\s*\{(?P<again>\d+)\}|\((?P<bracketed>\d+)\)"
    r"|(?P<digit>\d)(?P=digit){2,}\s*(?:\.\.\.|\u2026|\\l?dots))"
)
_HEXADECIMAL = re.compile(r"(?P<sign>[+-]?)0[xX](?P<digits>[0-9a-fA-F]+)")
_IN_BASE = re.compile(r"(?P<sign>[+-]?)(?P<digits>[0-9A-Z]+)_\s*(?:\{\s*(?P<base>\d\d?)\s*\}|(?P<digit>\d))")
_WRAPPED = (
    re.compile(r"\$+([^$]*)\$+"),
    re.compile(r"\\[(\[](.*)\\[)\]]", re.DOTALL),
    re.compile(
        r"\\(?:boxed|fbox|framebox|text|text(?:bf|it|rm|sf|tt)|math(?:bf|it|rm|sf|tt)|mbox|emph|bf|bm|boldsymbol|underline)"
        r"\s*\{([^{}]*)\}"
    ),
    re.compile(r"(?:=|\\approx(?![a-zA-Z]))\s*([^=\s].*)", re.DOTALL),
    re.compile(r"\*\*([^*]*)\*\*"),
)
_CURRENCY = re.compile(
    r"^(?P<sign>[+-]?)\s*(?:US\s*)?(?P<name>\\?\$|\\pounds|\\euro|[\u00a3\u00a5\u20ac\u20b9]|(?:USD|EUR|GBP|INR|Rs\.?)(?=[\s\d]))"
    r"\s*"
)
_DEGREE = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\deg(?:ree)?(?![a-zA-Z])|\u00b0)")
_IN_TEXT = r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}"
_UNIT_COMMAND = re.compile(rf"(?:\\[,;:! ]|~|\s)*{_IN_TEXT}(\s*\^\s*\{{?\d\}}?)?$")
_UNIT_TAIL = re.compile(
    r"(?<=[\d.)}])(?P<gap>(?:\\[,;:! ]|~|\s)*)"
    r"(?P<unit>(?:\\?\$|[A-Za-z\u00a2\u00a3\u00a5\u20ac\u20b9\u00b0])(?:[A-Za-z/*. \u00b0]|\^\{?-?\d\}?)*)$"
)
_UNIT_WORDS = re.compile(r"(?<=[\d.)}])\s+((?:[A-Za-z]+\.?\s*){1,3})$")
_SHORT_UNITS = "eV GB MB kB TB mph kph rpm"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten that words behind a number mean."""
_NO_UNITS = (
    "and by cubed dozen factorial half less mod modulo minus more nor not of or over pi plus point root sqrt squared "
    "than thirds times to"
)
"""Words that change the number before them."""
_PERCENT = re.compile(
    r"\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*per\s?cent\s*\}|(?<![A-Za-z])per\s?cent)(?![A-Za-z])"
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_SYMBOLS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2044": "/", "\u2032": "'", **{sign: f"\\{name} " for sign, name in {
        "\u221e": "infty", "\u2264": "le", "\u2265": "ge", "\u2260": "ne", "\u222a": "cup", "\u2229": "cap",
        "\u2205": "emptyset", "\u00b1": "pm", "\u00b7": "cdot", "\u22c5": "cdot", "\u2220": "angle",
        "\u25b3": "triangle", "\u2208": "in", "\u2248": "approx", "\u03b1": "alpha", "\u03b2": "beta",
        "\u03b3": "gamma", "\u03b4": "delta", "\u03b8": "theta", "\u03bb": "lambda", "\u03bc": "mu", "\u03c0": "pi",
        "\u03c3": "sigma", "\u03c6": "phi", "\u03c9": "omega",
    }.items()},
})  # fmt: skip
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_DEGREES = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_POWERS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207a]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")


@dataclass(frozen=True, slots=True)
class ReadNumber:
    """A number as it was read."""

    value: Fraction
    """Exact."""
    is_decimal: bool
    """Written with a decimal point or an exponent: it may be rounded."""
    unit: Unit | None = None
    """Behind or before it; None = there is none, or an unknown one."""
    digits: Fraction | None = None
    """Of a number with its base (`1011_2`): its digits read as a decimal number. None for any other."""


def unwrap(text: str) -> str:
    """Return a text without what may be around an answer: blanks, `$`, `\\text{}`, a full stop. Signs become LaTeX."""
    text = _PERCENT.sub(r"\\%", _as_latex(text.strip()))
    while True:
        bare = text.strip().rstrip(".,;:").strip() if not text.endswith("..") else text
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(bare):
                bare = match[1].strip()
        if bare == text:
            return text
        text = bare


def _as_latex(text: str) -> str:
    text = _ROOT.sub(lambda match: f"\\sqrt{_DEGREES[match[1]]}{{{match[2] or match[3] or match[4] or ''}}}", text)
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_POWERS)}}}", text.translate(_SYMBOLS))
    return _VULGAR.sub(_write_fraction, text).strip()


def _write_fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f" \\frac{{{over}}}{{{under}}}"


def read_number(text: str) -> ReadNumber | None:
    """Read a text that is one number, with a currency sign or a unit at most. None for any other text."""
    if len(text) > 2 * MOST_DIGITS:
        return None
    bare = unwrap(text)
    if match := _IN_BASE.fullmatch(bare):
        return _read_in_base(match)
    if (match := _HEXADECIMAL.fullmatch(bare)) and len(match["digits"]) <= MOST_DIGITS:
        return ReadNumber(Fraction(int(match["sign"] + match["digits"], 16)), False)
    text, scale, unit = _split_unit(bare)
    if match := _FRACTION.fullmatch(text):
        found = _read_fraction(match)
    elif match := _REPEATING.fullmatch(text):
        found = _read_repeating(match)
    elif match := _POWER_OF_TEN.fullmatch(text) or _NUMBER.fullmatch(text):
        found = _read_decimal(match)
    else:
        return None
    return found and replace(found, value=found.value * 10**scale, unit=unit)


def _read_in_base(match: re.Match[str]) -> ReadNumber | None:
    base, digits = int(match["base"] or match["digit"]), match["digits"]
    if not 2 <= base <= 36 or len(digits) > MOST_DIGITS or any(int(digit, 36) >= base for digit in digits):
        return None
    sign = -1 if match["sign"] == "-" else 1
    return ReadNumber(
        Fraction(sign * int(digits, base)), False, None, Fraction(sign * int(digits)) if digits.isdecimal() else None
    )


def _read_repeating(match: re.Match[str]) -> ReadNumber | None:
    """`0.1\\overline{6}`, `0.1(6)` and `0.1666...` are exact: 1/6."""
    whole, once, again = match["digits"] or "0", match["once"], match["again"] or match["bracketed"] or match["digit"]
    if len(whole) + len(once) + len(again) > MOST_DIGITS:
        return None
    value = Fraction(int(whole + once)) + Fraction(int(again), 10 ** len(again) - 1)
    return ReadNumber((-1 if match["sign"] == "-" else 1) * value / 10 ** len(once), False)


def _read_decimal(match: re.Match[str]) -> ReadNumber | None:
    groups = match.groupdict()
    digits = _plain(groups.get("digits") or "1")
    power = int((groups.get("e") or groups.get("p") or "0")[: MOST_DIGITS + 1])
    if max(abs(power), len(digits)) > MOST_DIGITS:
        return None
    value = Fraction(digits) * Fraction(10) ** power
    return ReadNumber(-value if match["sign"] == "-" else value, "." in digits or bool(power))


def _read_fraction(match: re.Match[str]) -> ReadNumber | None:
    over, under = (_plain(match[a] or match[b] or match[c] or "") for a, b, c in (("a", "c", "f"), ("b", "d", "g")))
    if max(len(over), len(under), len(match["whole"] or "")) > MOST_DIGITS or not Fraction(under):
        return None
    value = Fraction(match["whole"] or 0) + Fraction(over) / Fraction(under)
    return ReadNumber(-value if match["sign"] == "-" else value, "." in over + under)


def _plain(digits: str) -> str:
    """Digits without separators; `5.` is 5."""
    bare = re.sub(_GAP, "", digits).removesuffix(".")
    bare = bare.replace(".", "") if bare.count(".") > 1 else bare  # 1.000.000
    return f"0{bare}" if bare.startswith(".") else bare


def _split_unit(text: str) -> tuple[str, int, Unit | None]:
    """Return a text without the currency before it and the units behind it, their power of ten, and the unit."""
    scale, units = 0, []
    if match := _CURRENCY.match(text):
        units.append(read_unit(match["name"].replace("\\pounds", "\u00a3").replace("\\euro", "\u20ac").strip("\\.")))
        text = match["sign"] + text[match.end() :]
    text = _DEGREE.sub("\u00b0", text)
    while match := _UNIT_COMMAND.search(text) or _UNIT_TAIL.search(text) or _UNIT_WORDS.search(text):
        in_text = match.re is _UNIT_COMMAND
        named = (
            match["unit"].replace("\\$", "$")
            if match.re is _UNIT_TAIL
            else match[1] + (match[2] or "" if in_text else "")
        )
        words = named.split()
        if words and words[0] in _SCALES:
            scale += _SCALES[words.pop(0)]
        unit = read_unit(" ".join(words))
        touches = match.re is _UNIT_TAIL and not match["gap"] and not are_symbols(named)
        if not match.start() or touches or not (unit or _are_words(words, in_text)):
            break
        units += [unit] if words else []
        text = text[: match.start()]
    return re.sub(r"(?:\\[,;:! ]|\s)+$", "", text), scale, units[0] if len(units) == 1 else None


def _are_words(words: list[str], in_text: bool) -> bool:
    """Whether words behind a number name what is counted, and are neither variables nor part of the number."""
    bare = [re.sub("[^A-Za-z]", "", word) for word in words]
    if any(word.lower() in _NO_UNITS.split() or word in _SCALES for word in bare):
        return False
    first = "".join(bare[:1])
    is_word = len(first) > 2 and first.lower() not in _ALPHABET and not re.search(r"[/*^\u00b0]", "".join(words))
    return in_text or not bare or first in _SHORT_UNITS.split() or is_word
