"""Units and currencies behind and before numbers: what is known can be converted, `1 hour` is `60 minutes`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

_TABLE = {
    "length": "1/1000 mm millimeter millimetre, 1/100 cm centimeter centimetre, 1 m meter metre, "
    "1000 km kilometer kilometre, 0.0254 in inch inches, 0.3048 ft foot feet, 0.9144 yd yard, 1609.344 mi mile",
    "mass": "1/1000 mg milligram, 1 g gram, 1000 kg kilogram, 453.59237 lb lbs, 28.349523125 oz ounce",
    "time": "1/1000 ms millisecond, 1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 week",
    "months": "1 month, 12 yr year",
    "volume": "1/1000 ml mL milliliter millilitre, 1/100 cl, 1/10 dl, 1 l L liter litre",
    "dollars": "1 $ dollar USD, 1/100 \u00a2 cent",
    "euros": "1 \u20ac euro EUR",
    "sterling": "1 \u00a3 GBP",
    "yen": "1 \u00a5 yen JPY",
    "rupees": "1 \u20b9 Rs rupee INR",
    "angle": "1 \u00b0 degree deg",
    "radians": "1 rad radian",
    "Celsius": "1 \u00b0C Celsius",
    "Fahrenheit": "1 \u00b0F Fahrenheit",
    "Kelvin": "1 K Kelvin",
    "force": "1 N Newton, 1000 kN",
    "energy": "1 J Joule, 1000 kJ",
    "power": "1 W Watt, 1000 kW, 1000000 MW",
    "voltage": "1 V Volt",
    "current": "1 A Ampere amp",
    "frequency": "1 Hz Hertz, 1000 kHz, 1000000 MHz",
    "pressure": "1 Pa Pascal, 1000 kPa",
    "amount": "1 mol mole",
}
"""Dimension -> factor and names of its units. `pounds` is mass or money, and not here."""
_UNITS = {
    name: (dimension, Fraction(row.split()[0]))
    for dimension, rows in _TABLE.items()
    for row in rows.split(", ")
    for name in row.split()[1:]
}
_LOWER = {name.lower(): unit for name, unit in _UNITS.items() if len(name) > 3}
_PARTS = re.compile(
    r"\u00b0\s*[CF](?![A-Za-z])|[A-Za-z]+|\^\s*\{?\s*-?\d\s*\}?|[/*$\u00a2\u20ac\u00a3\u00a5\u20b9\u00b0]"
)
_NOTHING = re.compile(r"(?:[\s.{}\u00b7~]|\\[,;:! ]|\\cdot(?![a-zA-Z]))*")
_BEFORE = {"square": 2, "sq": 2, "cubic": 3}
_AFTER = {"squared": 2, "cubed": 3}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit that is known."""

    dimension: tuple[tuple[str, int], ...]
    """Base quantities and their powers, in order."""
    factor: Fraction
    """What one of it is in the unit with factor 1."""


def read_unit(text: str) -> Unit | None:
    """Read `km/h`, `m/s^2`, `square meters`, `\u00b0C`. None if a part of it is not known, or nothing is there."""
    powers, factor, sign, last, ahead = Counter[str](), Fraction(1), 1, None, 1
    if not text.strip() or _NOTHING.fullmatch(_PARTS.sub("", text)) is None:
        return None
    for part in (match[0] for match in _PARTS.finditer(text)):
        power = _AFTER.get(part) or (int(re.sub(r"[^\d-]", "", part)) if part[0] == "^" else None)
        if power is not None:
            if last is None:
                return None
            # One is counted already.
            powers[last[0]] += sign * (power - 1)
            factor *= last[1] ** (sign * (power - 1))
        elif part in ("/", "per"):
            sign = -1
        elif part in _BEFORE:
            ahead = _BEFORE[part]
        elif part not in ("*", "a", "an"):
            last = _find(part.replace(" ", ""))
            if last is None:
                return None
            powers[last[0]] += sign * ahead
            factor *= last[1] ** (sign * ahead)
            ahead = 1
    found = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(found, factor) if found else None


def are_symbols(text: str) -> bool:
    """Whether a unit is written in symbols of at least two letters or signs (`5cm`), which may touch the number."""
    words = re.findall(r"[A-Za-z]+", text)
    return not text[:1].isalpha() or not words or len(words[0]) > 1


def _find(name: str) -> tuple[str, Fraction] | None:
    for form in (name, name.removesuffix("s")):
        if found := _UNITS.get(form) or _LOWER.get(form.lower()):
            return found
    return None
