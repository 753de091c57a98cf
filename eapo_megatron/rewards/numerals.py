r"""Numbers that need no algebra: integers, decimals, fractions, mixed numbers, powers of ten, per cent and bases.

They are read as exact fractions, so that nothing is lost to rounding and a difference is never too small to count.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from eapo_megatron.rewards.spelling import without_groups

MIN_ROUNDED_DIGITS = 7

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<decimal>{_DECIMAL})"
    r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\s*\^\s*)\{?\s*(?P<exponent>[-+]?\s*\d{1,4})\s*\}?)?"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[-+]?)\s*10\s*\^\s*\{\s*(?P<exponent>[-+]?\d{1,4})\s*\}")
_INTEGER = r"(?:\d+)"
_RATIO = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<top>[-+]?\s*{_INTEGER})\s*/\s*(?P<bottom>{_INTEGER})"
    rf"|\\frac\{{\s*(?P<latex_top>[-+]?\s*{_INTEGER})\s*\}}\{{\s*(?P<latex_bottom>[-+]?\s*{_INTEGER})\s*\}})"
)
_MIXED = re.compile(rf"(?P<sign>[-+]?)\s*\((?P<whole>{_INTEGER})\+\\frac\{{(?P<top>\d+)\}}\{{(?P<bottom>\d+)\}}\)")
_REPEATING = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d*)\.(?P<fixed>\d*?)"
    r"(?:\\(?:overline|bar|overbar)\s*\{?\s*(?P<barred>\d+)\s*\}?|\((?P<bracketed>\d+)\)"
    r"|(?P<shown>\d+?)(?P=shown)(?P=shown)*\s*(?:\.\.\.|\\ldots)|\\dot\s*\{?(?P<dotted>\d)\}?(?:(?P<between>\d*)\\dot\s*\{?(?P<last>\d)\}?)?)"
)
_BASED = re.compile(r"(?P<sign>-?)\s*(?P<digits>[0-9A-Za-z]+)\s*_\{\s*(?P<base>\d{1,2})\s*\}")


class Number(NamedTuple):
    """A number as it was written: its value, and of a decimal the place of its last digit (10^place), else None."""

    value: Fraction
    place: int | None = None
    percent: bool = False


class BasedNumber(NamedTuple):
    """A number written in a base: 204_5."""

    digits: str
    base: int
    value: int


def read_number(text: str) -> Number | None:
    """The number that `text` (as `plain_latex` spells it) is; None when it is anything else."""
    text = text.strip()
    if text.endswith("%"):
        number = read_number(text[:-1])
        return None if number is None or number.percent else number._replace(percent=True)
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1]:
        text = text[1:-1].strip()
    text = without_groups(text)
    if match := _NUMBER.fullmatch(text):
        exponent = int((match["exponent"] or "0").replace(" ", ""))
        value = Fraction(match["decimal"]) * Fraction(10) ** exponent
        decimals = len(match["decimal"].partition(".")[2])
        rounded = "." in match["decimal"] or match["exponent"] is not None
        return Number(_signed(match, value), exponent - decimals if rounded else None)
    if match := _POWER_OF_TEN.fullmatch(text):
        return Number(_signed(match, Fraction(10) ** int(match["exponent"])))
    if match := _MIXED.fullmatch(text):
        return _over(match, int(match["top"]) + int(match["whole"]) * int(match["bottom"]), int(match["bottom"]))
    if match := _RATIO.fullmatch(text):
        top, bottom = match["top"] or match["latex_top"], match["bottom"] or match["latex_bottom"]
        return _over(match, int(top.replace(" ", "")), int(bottom.replace(" ", "")))
    if match := _REPEATING.fullmatch(text):
        period = match["barred"] or match["bracketed"] or match["shown"] or ""
        if match["dotted"]:
            period = match["dotted"] + (match["between"] or "") + (match["last"] or "")
        fixed = Fraction(int((match["whole"] or "0") + match["fixed"]), 10 ** len(match["fixed"]))
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(match["fixed"]))
        return Number(_signed(match, fixed + repeated))
    return None


def read_based(text: str) -> BasedNumber | None:
    """The number in a base that `text` is, such as 204_{5} or A5_{11}."""
    match = _BASED.fullmatch(text.replace(r"\text{", "").replace("}_", "_") if r"\text{" in text else text)
    if match is None or not 2 <= int(match["base"]) <= 36:
        return None
    digits, base = match["digits"].upper(), int(match["base"])
    if any(int(digit, 36) >= base for digit in digits):
        return None
    value = int(digits, base)
    return BasedNumber(match["sign"] + (digits.lstrip("0") or "0"), base, -value if match["sign"] else value)


def same_number(prediction: Number, reference: Number) -> bool:
    """Whether both are the same; per cent may be left out, or written as a fraction."""
    if same_exact(prediction, reference):
        return True
    if prediction.percent and not reference.percent:
        return prediction.value == 100 * reference.value
    if reference.percent and not prediction.percent:
        return reference.value == 100 * prediction.value
    return False


def same_exact(first: Number, second: Number) -> bool:
    """Exactly equal, or one is a decimal and the correct rounding of the other, whose digits never end."""
    if first.value == second.value:
        return True
    return any(
        not _terminates(exact.value) and is_rounding(decimal, exact.value)
        for decimal, exact in ((first, second), (second, first))
    )


def is_rounding(decimal: Number, value: Fraction) -> bool:
    """Whether `decimal` shows MIN_ROUNDED_DIGITS significant digits or more, and `value` rounds to it there."""
    if decimal.place is None or decimal.value == 0:
        return False
    unit = Fraction(10) ** decimal.place
    digits = len(str(abs(decimal.value / unit).numerator))
    return digits >= MIN_ROUNDED_DIGITS and abs(value - decimal.value) <= unit / 2


def _terminates(value: Fraction) -> bool:
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value


def _over(match: re.Match[str], top: int, bottom: int) -> Number | None:
    return None if bottom == 0 else Number(_signed(match, Fraction(top, bottom)))
