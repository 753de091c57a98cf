r"""Values of LaTeX expressions at fixed points, to 60 digits: an evaluator that owes nothing to the reward's.

A recursive descent over numbers, letters, \frac, \sqrt, powers, factorials and elementary functions; letters have
fixed values. Not for use as a verifier: what it cannot read has no value.
"""

from __future__ import annotations

import re
from collections import Counter

import mpmath

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|[a-zA-Z](?:_\{?\w+\}?)?|.)", re.DOTALL)
_FUNCTIONS = {"\\sin": mpmath.sin, "\\cos": mpmath.cos, "\\tan": mpmath.tan, "\\ln": mpmath.log, "\\log": mpmath.log10}
_FUNCTIONS |= {
    "\\arcsin": mpmath.asin,
    "\\arctan": mpmath.atan,
    "\\sec": mpmath.sec,
    "\\csc": mpmath.csc,
    "\\cot": mpmath.cot,
}
_CONSTANTS = {"\\pi": mpmath.pi, "e": mpmath.e, "i": mpmath.j}
_POINTS = 2


class Unreadable(ValueError):
    """LaTeX that this evaluator does not know."""


def values_of(latex: str) -> list[Counter[str]] | None:
    """At each point the values of the comma-separated parts to 50 digits, brackets aside; None where it has none."""
    text = re.sub(r"\\[!,;: ]|\\(?:left|right)|\$|~|\\quad", "", latex.replace(r"\!", "").replace("{,}", ","))
    text = re.sub(r"(?<!\d)(\d{1,3})((?:,\d{3})+)(?!\d)", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"^\s*(?:[a-zA-Z]|[a-z]\([a-z]\))\s*=(?!.*=)", "", text)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").strip().rstrip(".")
    with mpmath.workdps(60):
        try:
            return [Counter(_rounded(value) for value in _parts(text, point)) for point in range(_POINTS)]
        except (Unreadable, ZeroDivisionError, ValueError, OverflowError, TypeError):
            return None


def _parts(text: str, point: int) -> list[mpmath.mpc]:
    for bracket in ("(", "[", r"\{"):
        if text.startswith(bracket) and "," in text and text.count(bracket) == 1:
            text = text[len(bracket) : -len(bracket)]
            break
    parts = text.split(",")
    if any(part.count(opening) != part.count(closing) for part in parts for opening, closing in ("()", "[]", "{}")):
        raise Unreadable(text)
    return [_Reader(part, point).read() for part in parts]


def _rounded(value: mpmath.mpc) -> str:
    value = mpmath.mpmathify(value)
    if abs(value.real) > mpmath.mpf(10) ** 5000:
        raise Unreadable("too large")
    return mpmath.nstr(value.real, 45) + " " + mpmath.nstr(value.imag, 45)


class _Reader:
    """sum := product (("+" | "-") product)*; product := power (("*" | "/" | "") power)*; power := atom ("^" group)?"""

    def __init__(self, text: str, point: int) -> None:
        self._tokens = [token for token in _TOKEN.findall(text) if token.strip()]
        self._point = point

    def read(self) -> mpmath.mpc:
        value = self._sum()
        if self._tokens:
            raise Unreadable(self._tokens[0])
        return value

    def _next(self) -> str:
        return self._tokens[0] if self._tokens else ""

    def _take(self, expected: str = "") -> str:
        if not self._tokens or (expected and self._tokens[0] != expected):
            raise Unreadable(f"{self._next()!r} in the place of {expected!r}")
        return self._tokens.pop(0)

    def _sum(self) -> mpmath.mpc:
        value = mpmath.mpf(0)
        sign = self._take() if self._next() in ("+", "-") else "+"
        while True:
            product = self._product()
            value = value + product if sign == "+" else value - product
            if self._next() not in ("+", "-"):
                return value
            sign = self._take()

    def _product(self) -> mpmath.mpc:
        value, whole = self._power(), False
        while True:
            token = self._next()
            if token in ("*", r"\cdot", r"\times"):
                self._take()
                value = value * self._signed_power()
            elif token == "/":
                self._take()
                value = value / self._signed_power()
            elif token == r"\frac" and not whole and isinstance(value, mpmath.mpf) and self._plain_integer(value):
                fraction = self._power()
                value, whole = (value + fraction if self._mixed else value * fraction), True
            elif token and (
                token[0].isalnum()
                or token[0] in "(.{"
                or token in (r"\frac", r"\sqrt", r"\pi", *_FUNCTIONS)
                or self._is_letter(token)
            ):
                value = value * self._power()
            else:
                return value

    @property
    def _mixed(self) -> bool:
        return self._last_fraction is not None and self._last_fraction[0] < self._last_fraction[1]

    _last_fraction: tuple[mpmath.mpf, mpmath.mpf] | None = None
    _last_integer: mpmath.mpf | None = None

    def _plain_integer(self, value: mpmath.mpf) -> bool:
        return self._last_integer is not None and value == self._last_integer

    def _signed_power(self) -> mpmath.mpc:
        if self._next() == "-":
            self._take()
            return -self._power()
        return self._power()

    def _power(self) -> mpmath.mpc:
        self._last_integer = None
        token = self._next()
        value = self._atom()
        if token.isdigit():
            self._last_integer = value
        while self._next() == "!":
            self._take()
            value, self._last_integer = mpmath.factorial(value), None
        if self._next() == "^":
            self._take()
            self._last_integer = None
            value = mpmath.power(value, self._group())
        return value

    def _group(self) -> mpmath.mpc:
        if self._next() == "{":
            self._take()
            value = self._sum()
            self._take("}")
            return value
        if self._next()[:1].isdigit() and len(self._next()) > 1:  # \frac12, x^23
            token = self._take()
            self._tokens.insert(0, token[1:])
            return mpmath.mpf(token[0])
        return self._atom()

    def _is_letter(self, token: str) -> bool:
        return (
            token[0].isalpha()
            or re.fullmatch(r"\\(?:alpha|beta|theta|omega|tau|sigma|lambda|gamma|rho)", token) is not None
        )

    def _atom(self) -> mpmath.mpc:
        token = self._take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            if self._next()[:1] in ("e", "E") and len(self._tokens) > 1 and re.fullmatch(r"-|\d+", self._tokens[1]):
                self._take()
                sign = -1 if self._next() == "-" and self._take() else 1
                return mpmath.mpf(token) * mpmath.mpf(10) ** (sign * int(self._take()))
            return mpmath.mpf(token)
        if token in ("(", "{"):
            value = self._sum()
            self._take({"(": ")", "{": "}"}[token])
            return value
        if token == r"\frac":
            top, bottom = self._group(), self._group()
            self._last_fraction = (abs(top), abs(bottom)) if isinstance(top, mpmath.mpf) else None
            return top / bottom
        if token == r"\sqrt":
            degree = mpmath.mpf(2)
            if self._next() == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            return mpmath.power(self._group(), 1 / degree)
        if token in _FUNCTIONS and self._next() not in ("^", "_", ""):
            argument = self._group() if self._next() in ("{", "(") else self._product()
            return _FUNCTIONS[token](argument)
        if token in _CONSTANTS:
            return +_CONSTANTS[token] if token != "i" else mpmath.j
        if self._is_letter(token):
            seed = sum((index + 1) * ord(character) for index, character in enumerate(re.sub(r"[{}]", "", token)))
            return mpmath.mpf(7 + (seed * (13 + self._point)) % 101) / (29 + self._point)
        raise Unreadable(token)
