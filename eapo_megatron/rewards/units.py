r"""Units and other words after a value: 5 \text{ cm}^2, 90^{\circ}, \text{dollars} 32.

A unit is what is marked as text, or a degree sign, beside a value. Letters in mathematics are variables, never units.
"""

from __future__ import annotations

import re

_BEFORE = re.compile(
    r"(?P<sign>-?)\s*\\text\{\s*(?P<unit>dollars|euros|pounds sterling|yen|rupees)\s*\}\s*(?P<value>\S.*)", re.DOTALL
)
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}(?:\s*\^\s*\{\s*-?\d+\s*\})?"
_AFTER = re.compile(
    rf"(?P<value>.*?[^\s,;=<>+\-*/(\[{{\\^_])\s*(?P<unit>(?:\^\{{\\circ\}}\s*(?:\\text\{{\s*[CF]\s*\}}|[CF](?![a-zA-Z]))?|(?:{_TEXT}\s*(?:(?:[/.]|\\cdot)\s*)?)+))",
    re.DOTALL,
)
_POWER = re.compile(r"\^\s*\{?\s*-?\d+")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_NAMES = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "in": "inch", "ft": "foot", "feet": "foot",
    "yd": "yard", "mi": "mile", "g": "gram", "kg": "kilogram", "mg": "milligram", "lb": "pound", "oz": "ounce",
    "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "inches": "inch", "usd": "dollar",
    "l": "liter", "ml": "milliliter", "sq": "square", "mph": "mile per hour", "deg": "degree", "cubed": "cubic",
    "metre": "meter", "centimetre": "centimeter", "kilometre": "kilometer", "litre": "liter", "/": "per",
}  # fmt: skip
_POWERS = {"2": "square", "3": "cubic"}


def split_unit(value: str) -> tuple[str, str | None]:
    r"""`value` without the unit marked beside it, and the unit's name; None where there is none.

    The degrees in \cos(6^{\circ}) belong to the function, and a value that is text alone is no unit.
    """
    if match := _BEFORE.fullmatch(value):
        inner, second = split_unit(match["value"])
        if second in (None, _name(rf"\text{{{match['unit']}}}")):
            return match["sign"] + inner, _name(rf"\text{{{match['unit']}}}")
    match = _AFTER.fullmatch(value)
    if match is None or (match["unit"].startswith("^") and _FUNCTION.search(match["value"])):
        return value, None
    words = _name(match["unit"]).split()
    if not words or {"or", "and", "not"}.intersection(words) or re.search(r"\d", _POWER.sub("", match["unit"])):
        return value, None  # another answer, no unit
    return match["value"].strip(), _name(match["unit"])


def same_unit(first: str | None, second: str | None) -> bool:
    """Whether both are the same, or one is left out."""
    return first is None or second is None or first == second


def _name(unit: str) -> str:
    r"""One name for cm, centimeters and \text{ cm}."""
    unit = re.sub(r"\^\{\\circ\}\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?", lambda m: f" degree {m[1] or m[2] or ''}", unit)
    unit = re.sub(r"\b([ap])\.\s*m\b\.?", r"\1.m.", unit).replace("a.m.", "ante").replace("p.m.", "post")
    words = []
    for word, power in re.findall(
        r"([a-zA-Z]+|[/])(?:\}?\s*\^\s*\{?\s*(-?\d+))?", unit.replace(r"\text", " ").replace(r"\cdot", " ")
    ):
        name = _NAMES.get(word) or _NAMES.get(word.lower()) if len(word) > 1 else _NAMES.get(word, word)
        name = name or word
        if len(name) > 3 and name.endswith("s") and not name.endswith("ss"):
            singular = name[:-1]
            name = _NAMES.get(singular, singular)
        words += [_POWERS.get(power, power), name] if power else [name]
    return " ".join(words)
