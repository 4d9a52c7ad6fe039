"""Numbers as people write them in answers, read exactly: `1 000`, `72 dollars`, `6.63\\times10^{-34}`, `2 2/3`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MOST_DIGITS = 1000
"""A number with more digits, or an exponent beyond it, is not read: its exact value would take long to compute."""

_GAP = r"(?:\\[,;:! ]|\{,\}|[ ~,'\u00a0\u2009\u202f])"
_DIGITS = rf"(?:\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_TEN = r"10\s*(?:\^|\*\*)\s*[{(]?\s*(?P<p>[+-]?\d+)\s*[)}]?"
_POWER = rf"(?:[eE](?P<e>[+-]?\d+)|\s*(?:\\times|\\cdot|\*|x|\u00d7|\u00b7)\s*{_TEN})"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_DECIMAL})(?:{_POWER})?")
_POWER_OF_TEN = re.compile(rf"(?P<sign>[+-]?)\s*{_TEN}")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+|(?=\\)))?(?:\\[dt]?frac\s*"
    rf"(?:\{{\s*(?P<a>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<b>{_DECIMAL})\s*\}}|(?P<c>\d)\s*(?P<d>\d))"
    rf"|(?P<f>{_DECIMAL})\s*/\s*(?P<g>{_DECIMAL}))"
)
_WRAPPED = (
    re.compile(r"\$+([^$]*)\$+"),
    re.compile(r"\\[(\[](.*)\\[)\]]", re.DOTALL),
    re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|textrm|mbox)\s*\{([^{}]*)\}"),
    re.compile(r"\*\*([^*]*)\*\*"),
)
_CURRENCY = re.compile(r"^(?P<sign>[+-]?)\s*(?:\\?\$|\\pounds|\\euro|[\u00a3\u00a5\u20ac\u20b9])\s*")
_UNIT_COMMAND = re.compile(
    r"(?:\\[,;:! ]|~|\s)*\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?$"
)
_UNIT_WORDS = re.compile(r"(?<=[\d.)}])\s+((?:[A-Za-z]+\.?\s*){1,3})$")
_SHORT_UNITS = "cm mm km kg mg ml mL cl dl ft lb oz Hz eV kJ kW mW GB MB kB TB kPa mph kph rpm hrs lbs USD"
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


@dataclass(frozen=True, slots=True)
class ReadNumber:
    """A number as it was read."""

    value: Fraction
    """Exact."""
    is_decimal: bool
    """Written with a decimal point or an exponent: it may be rounded."""


def unwrap(text: str) -> str:
    """Return a text without what may be around an answer: blanks, `$`, `\\text{}`, a full stop."""
    text = _PERCENT.sub(r"\\%", text.strip().replace("\u2212", "-").replace("\u2013", "-"))
    while True:
        bare = text.strip().rstrip(".,;:").strip() if not text.endswith("..") else text
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(bare):
                bare = match[1].strip()
        if bare == text:
            return text
        text = bare


def read_number(text: str) -> ReadNumber | None:
    """Read a text that is one number, with a currency sign or a unit at most. None for any other text."""
    if len(text) > 2 * MOST_DIGITS:
        return None
    text, scale = _split_unit(unwrap(text))
    if match := _FRACTION.fullmatch(text):
        found = _read_fraction(match)
    elif match := _POWER_OF_TEN.fullmatch(text) or _NUMBER.fullmatch(text):
        found = _read_decimal(match)
    else:
        return None
    return found and ReadNumber(found.value * 10**scale, found.is_decimal)


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
    return f"0{bare}" if bare.startswith(".") else bare


def _split_unit(text: str) -> tuple[str, int]:
    """Return a text without a currency sign before it and units behind it, and the power of ten that they mean."""
    text, scale = _CURRENCY.sub(r"\g<sign>", text), 0
    while match := _UNIT_COMMAND.search(text) or _UNIT_WORDS.search(text):
        words = match[1].split()
        if words and words[0] in _SCALES:
            scale += _SCALES[words.pop(0)]
        if not match.start() or not _are_units(words, "\\" in match[0]):
            break
        text = text[: match.start()]
    return re.sub(r"(?:\\[,;:! ]|\s)+$", "", text), scale


def _are_units(words: list[str], in_text: bool) -> bool:
    """Whether words behind a number name what is counted, and are neither variables nor part of the number."""
    bare = [re.sub("[^A-Za-z]", "", word) for word in words]
    if any(word.lower() in _NO_UNITS.split() or word in _SCALES for word in bare):
        return False
    first = "".join(bare[:1])
    return in_text or not bare or first in _SHORT_UNITS.split() or (len(first) > 2 and first.lower() not in _ALPHABET)
