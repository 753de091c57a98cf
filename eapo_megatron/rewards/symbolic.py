r"""Equality of two expressions: math-verify's parser, exact arithmetic, and values at points.

math-verify is the engine: its parser (latex2sympy2_extended) makes sympy expressions of LaTeX, and `verify` decides on
sets. Wrapped around it, because each of these makes different answers equal:

- Its normalisation is off. It cuts units from both sides that nobody marked (the h of 2\pi r h), all that follows
  \mathrm, and compares what is left as text. `spelling` and `units` stand in its place.
- Letters keep their case (it lowers them: R/r = 1), their indices and their primes (it drops primes).
- Decimals are parsed as fractions. It rounds to six decimal places, which makes all small quantities zero.
- Values are compared relative to their size, with as many digits as it takes. It takes a difference below 1e-15 for
  none: 2^{-80} = 2^{-81}.
- The degrees inside a function are converted. It drops them: \tan 15^{\circ} = \tan 15.
- Its comparison of symbols as text is not used: it sorts and lowers the letters of words.

Expressions with letters are equal when they agree at random points: letters are real numbers, and points where either
side is no real number count only where it is so everywhere. i is the imaginary unit and e Euler's number.
"""

from __future__ import annotations

import logging
import random
import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.random import seed as seed_sympy

from eapo_megatron.rewards.numerals import Number, is_rounding

# math-verify warns when its own time limit is off; it is a signal that only works in a process's main thread, and the
# reward pool enforces one from outside instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_KEEP_CASE = ConversionConfig(lowercase_symbols=False)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_DEGREES = re.compile(r"(\d+|\([^()]*\)|\{[^{}]*\}|\\[a-z]+|[a-z])\s*\^\{\\circ\}")
_ACCENT = r"\\(?:d?dot|hat|bar|vec|tilde|overline|overrightarrow)\s*\{\s*(?:\\?[a-zA-Z]+)\s*\}"
_NAME = re.compile(
    rf"((?<![a-zA-Z\\])[a-zA-Z]|\\[a-zA-Z]+|{_ACCENT})(_\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})?('*)(_\{{[^{{}}]*\}})?"
)
_COMMANDS_WITH_INDEX = {r"\log", r"\sum", r"\prod", r"\int", r"\lim", r"\max", r"\min", r"\text", r"\mathbb"}

_POINTS = 6
_DIGITS = 40  # of values at points
_AGREEMENT = sympy.Rational(1, 10**30)
_MAX_DIGITS = 600  # two constants that agree to so many are the same
_SURE_BITS = 20
# Letters that the parser takes for functions and constants.
_LETTERS = re.compile(r"\\(?:d?dot|hat|[gG]amma|[bB]eta|[zZ]eta|psi|chi|phi|varphi|eta|mu|delta)(?![a-zA-Z])")
_FIGURE = re.compile(r"\\(triangle|angle|overline|widehat|vec)\s*\{?\s*([A-Z]{2,})\s*\}?")


def same_expression(prediction: str, reference: str) -> bool:
    """Whether two values, spelled by `plain_latex`, are equal; False where either is no expression."""
    predicted, expected = parse_expression(prediction), parse_expression(reference)
    if predicted is None or expected is None:
        return False
    if not isinstance(predicted, sympy.Expr) or not isinstance(expected, sympy.Expr):
        return _same_sets(predicted, expected)
    return _proportion(predicted, expected) == 1


def is_rounded_to(decimal: Number, expression: str) -> bool:
    """Whether the constant `expression` rounds to `decimal` at its last digit."""
    value = parse_expression(expression)
    if not isinstance(value, sympy.Expr) or value.free_symbols or isinstance(value, sympy.Rational):
        return False
    number = _value(value, {})
    if number is None or not number.is_real:
        return False
    rational = sympy.Rational(number)
    return is_rounding(decimal, Fraction(int(rational.p), int(rational.q)))


def proportional(first: str, second: str) -> sympy.Expr | None:
    """The constant first / second when there is one other than 0, else None."""
    expressions = [parse_expression(text) for text in (first, second)]
    if not all(isinstance(expression, sympy.Expr) for expression in expressions):
        return None
    ratio = _proportion(*expressions)
    return None if ratio == 0 else ratio


def is_constant(text: str) -> bool:
    """Whether `text` is an expression without letters, infinity included."""
    expression = parse_expression(text)
    return isinstance(expression, sympy.Expr) and not expression.free_symbols


def parse_expression(text: str) -> Any:
    """The sympy object that math-verify's parser makes of `text`, with exact numbers; None where it makes none."""
    if not _balanced(text):  # the parser would take seconds to find out
        return None
    text = _DEGREES.sub(r"{\\frac{\1 \\pi}{180}}", text)
    text = _FIGURE.sub(r"\\text{\1\2}", _DECIMAL.sub(_exact, text))
    text = _NAME.sub(_plain_name, text.replace("%", r"\cdot\frac{1}{100}"))
    try:
        parsed = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_KEEP_CASE
        )
        return _rebuilt(parsed)
    except Exception:  # the parser raises bare Exceptions for what is no mathematics, sympy many kinds
        return None


def _balanced(text: str) -> bool:
    """Whether as many brackets close as open, of any kind: intervals mix them."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _rebuilt(parsed: Any) -> Any:
    """Evaluated, with i and e for the letters and a symbol for what has no value at a point."""
    if not isinstance(parsed, sympy.Basic):
        return None
    letters = {symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}
    expression = parsed.subs(letters)
    if isinstance(expression, sympy.Expr):
        expression = expression.replace(
            lambda part: isinstance(part, AppliedUndef | sympy.Derivative | sympy.Integral),
            lambda part: sympy.Symbol(sympy.srepr(part), real=True),
        )
        expression = expression.doit()
        if expression.has(sympy.nan, sympy.zoo):
            return None
    return expression


def _exact(match: re.Match[str]) -> str:
    return rf"{{\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}}}"


def _plain_name(match: re.Match[str]) -> str:
    r"""A letter with an index, primes or an accent as \text{...}: the parser makes one symbol of it."""
    letter, before, primes, after = match.groups(default="")
    if letter in _COMMANDS_WITH_INDEX or not (before or primes or after or _LETTERS.match(letter)):
        return match[0]
    name = "".join(c if c.isalpha() else f"q{ord(c)}q" for c in (letter + before + primes + after).replace(" ", ""))
    return rf"\text{{{name}}}"


def _same_sets(predicted: Any, expected: Any) -> bool:
    # sympy tries some identities at random points; a fixed seed makes the reward a function of its arguments alone.
    seed_sympy(0)
    if predicted == expected:
        return True
    if isinstance(predicted, sympy.FiniteSet | sympy.Tuple) or isinstance(expected, sympy.FiniteSet | sympy.Tuple):
        return False  # element by element elsewhere
    return bool(verify(expected, predicted, timeout_seconds=None))


def _proportion(first: sympy.Expr, second: sympy.Expr) -> sympy.Expr | None:
    """1 when both are equal, 0 when one alone is zero, else the constant first / second, or None."""
    if first == second:
        return sympy.Integer(1)
    if first.has(sympy.oo) or second.has(sympy.oo):
        return None
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if not symbols:
        return _constant_proportion(first, second)
    at_real: list[sympy.Expr] = []
    elsewhere: list[sympy.Expr] = []  # where one side is no real number
    both_zero = False
    for point in _points(symbols):
        values = _value(first, point), _value(second, point)
        if None in values:
            continue
        if values == (0, 0):  # tells nothing of their ratio
            both_zero = True
            continue
        ratios = at_real if all(value.is_real for value in values) else elsewhere
        ratios.append(_ratio(*values))
        if at_real and not _close(at_real[0], at_real[-1]):
            return None
    ratios = at_real or elsewhere or [sympy.Integer(1)] * both_zero
    if not ratios or not all(_close(ratios[0], ratio) for ratio in ratios):
        return None
    if not _close(ratios[0], sympy.Integer(1)):
        return ratios[0]
    # They agree so far: look at the difference itself, with more and more digits.
    differences = (_value(first - second, point) for point in _points(symbols))
    return sympy.Integer(1) if next(value for value in differences if value is not None) == 0 else None


def _close(first: Any, second: Any) -> bool:
    return bool(_square(first - second) <= _AGREEMENT**2 * _square(second))


def _square(value: Any) -> Any:
    """Of the magnitude."""
    real, imaginary = value.as_real_imag()
    return real * real + imaginary * imaginary


def _points(symbols: list[sympy.Symbol]) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Positive and negative fractions and, for functions of integers, positive integers; always the same ones."""
    draw = random.Random(0)

    def fraction() -> sympy.Rational:
        return sympy.Rational(draw.randint(200, 4000), 997)

    points = [{symbol: fraction() for symbol in symbols} for _ in range(_POINTS)]
    points += [{symbol: draw.choice([-1, 1]) * fraction() for symbol in symbols} for _ in range(_POINTS)]
    points += [{symbol: sympy.Integer(draw.randint(2, 30)) for symbol in symbols} for _ in range(_POINTS)]
    return points


def _value(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational]) -> Any:
    """The value at a point to _DIGITS digits, exact where it is rational; None where it has none."""
    try:
        value = expression.subs(point)
        if isinstance(value, sympy.Rational):
            return value
        value = value.evalf(_DIGITS, maxn=_MAX_DIGITS)
    except (ZeroDivisionError, TypeError, ValueError, ArithmeticError):
        return None
    if not value.is_number or not value.is_finite:
        return None
    parts = [
        # evalf gives a number of one digit up when no digit of a difference is sure: it is zero.
        sympy.Integer(0) if isinstance(part, sympy.Float) and part._prec < _SURE_BITS else part
        for part in value.as_real_imag()
    ]
    return parts[0] + sympy.I * parts[1]


def _ratio(first: Any, second: Any) -> Any:
    """first / second; 0 where one alone is zero."""
    if first == second:
        return sympy.Integer(1)
    if not first or not second:
        return sympy.Integer(0)
    (a, b), (c, d) = first.as_real_imag(), second.as_real_imag()
    size = _square(second)
    return (a * c + b * d) / size + sympy.I * ((b * c - a * d) / size)


def _constant_proportion(first: sympy.Expr, second: sympy.Expr) -> Any:
    values = _value(first, {}), _value(second, {})
    if None in values:
        return None
    ratio = _ratio(*values)
    if not _close(ratio, sympy.Integer(1)):
        return ratio
    # They agree so far: look at the difference itself, with more and more digits.
    return sympy.Integer(1) if _value(first - second, {}) == 0 else None
