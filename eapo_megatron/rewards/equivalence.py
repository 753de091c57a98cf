"""Equality of two mathematical answers: text and plain numbers exactly, everything else by math-verify."""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.random import seed as seed_sympy

# math-verify warns when its own time limit is off; it is a signal that only works in a process's main thread, and the
# reward pool enforces one from outside instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_WHOLE_BOX = [LatexExtractionConfig(boxed_match_priority=0)]

# A doubled backslash ends a row of a matrix.
_LATEX_SPACE = re.compile(r"(?<!\\)\\[!,;: ]|~")
_LATEX_SIZE = re.compile(r"\\(?:left|right)(?![a-zA-Z])\.?|(?<!\\)\\[()\[\]]|\\?\$")
_FRACTION_NAME = re.compile(r"\\[dtc]frac")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_CONJUNCTION = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)")
# "1 1/2" must not become "11/2".
_LOOSE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")

_DECIMAL = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<decimal>{_DECIMAL})(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\s*\^\s*)\{{?(?P<exponent>[-+]?\d{{1,3}})\}}?)?"
)
_RATIO = re.compile(r"(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>\d+)")
_LATEX_RATIO = re.compile(r"(?P<sign>[-+]?)\\frac\s*\{\s*(?P<top>[-+]?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}")


def same_answer(prediction: str, reference: str) -> bool:
    """Whether two answers, as text or LaTeX, are equal; an empty answer equals nothing.

    Identical text and plain numbers (integers, decimals, thousands commas, powers of ten, simple fractions) are
    compared exactly. A reference wholly in \\text{} is compared as words, and one of several comma-separated values
    value by value in any order. All else is decided by math-verify, without a time limit and the same way every time.
    """
    prediction, reference = _clean(prediction), _clean(reference)
    if not prediction or not reference:
        return False
    if _LOOSE_SPACE.sub("", prediction) == _LOOSE_SPACE.sub("", reference):
        return True
    # Parsed as LaTeX, words are products of letters, and every anagram would be equal.
    if _TEXT.fullmatch(reference):
        return _words(prediction) == _words(reference)
    predicted_number, reference_number = _plain_number(prediction), _plain_number(reference)
    if predicted_number is not None and reference_number is not None:
        return predicted_number == reference_number
    reference_values = _values(reference) if reference_number is None else [reference]
    if len(reference_values) > 1:
        predicted_values = _values(prediction)
        if len(predicted_values) == len(reference_values):
            return _same_values(predicted_values, reference_values)
    return _symbolically_equal(prediction, reference)


def _clean(answer: str) -> str:
    """The answer without the marks that carry no meaning: spaces of LaTeX, sizes of brackets, math mode, full stop."""
    answer = _LATEX_SPACE.sub(lambda match: "" if match.group() == r"\!" else " ", answer)
    answer = _FRACTION_NAME.sub(r"\\frac", _LATEX_SIZE.sub("", answer))
    return answer.strip().rstrip(".").strip()


def _words(answer: str) -> str:
    return " ".join(_TEXT.sub(r" \1 ", answer).casefold().split()).strip("() ")


def _plain_number(answer: str) -> Fraction | None:
    if match := _NUMBER.fullmatch(answer):
        return Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    match = _RATIO.fullmatch(answer) or _LATEX_RATIO.fullmatch(answer)
    if match is None or int(match["bottom"]) == 0:
        return None
    ratio = Fraction(int(match["top"]), int(match["bottom"]))
    return -ratio if match.groupdict().get("sign") == "-" else ratio


def _values(answer: str) -> list[str]:
    r"""The comma-separated values of an answer such as "1, 3" or "\{1, 3\}"; commas inside brackets do not separate."""
    if answer.startswith(r"\{") and answer.endswith(r"\}") and r"\}" not in answer[:-2]:
        answer = answer[2:-2]
    values, depth, start = [], 0, 0
    answer = _CONJUNCTION.sub(",", answer)
    for position, character in enumerate(answer):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(answer[start:position])
            start = position + 1
    values.append(answer[start:])
    return [value.strip() for value in values if value.strip()]


def _same_values(predictions: list[str], references: list[str]) -> bool:
    remaining = list(predictions)
    for reference in references:
        match = next((value for value in remaining if same_answer(value, reference)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _symbolically_equal(prediction: str, reference: str) -> bool:
    # sympy tries some identities at random points; a fixed seed makes the reward a function of its arguments alone.
    seed_sympy(0)
    target, gold = (
        parse(rf"\boxed{{{answer}}}", _WHOLE_BOX, parsing_timeout=None)  # type: ignore[arg-type]
        for answer in (prediction, reference)
    )
    return verify(gold, target, timeout_seconds=None)
