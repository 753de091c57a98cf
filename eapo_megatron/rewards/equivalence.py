r"""Equality of two mathematical answers, taken apart into words, lists, brackets, relations, numbers and expressions.

What an answer is made of is read from its text; `numerals` compares plain numbers and `symbolic` single expressions.
docs/rewards.md lists the conventions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from eapo_megatron.rewards.numerals import read_based, read_number, same_number
from eapo_megatron.rewards.spelling import plain_latex
from eapo_megatron.rewards.symbolic import is_constant, is_rounded_to, proportional, same_expression
from eapo_megatron.rewards.units import same_unit, split_unit

_WORDS = re.compile(r"(?:\\text\{[^{}]*\}\s*)+|[A-Z]{2,}|\(\s*(?:\\text\{\s*[a-zA-Z]\s*\}|[a-zA-Z])\s*\)")
_CONJUNCTION = re.compile(
    r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))|;|\\(?:l?or|l?and|vee|wedge)(?![a-z])"
)
_COMMA_IN_TEXT = re.compile(r"\\text\{\s*,\s*(?:and|or)\s*\}")
_RELATION = re.compile(r"\\(?:le|ge|ne|in)(?![a-zA-Z])|[<>=]")
_SIDES = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
# A variable or function on the left of its value: x, f(x), m_{\max}, AB, \angle ABC; \ and braces only of commands.
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|text|mathcal|vec)\s*)?\{?\s*\\?[a-zA-Z]+(?:(?:\s+\\?|\\)[a-zA-Z]+){0,3}\s*\}?'*"
    r"(?:_\{(?:[^{}]|\{[^{}]*\})*\})?(?:\s*\([a-zA-Z, ]*\)|\s*\(\s*\\[a-z]+\s*\))?"
    r"|\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)"
)
_SHORT_WORD = re.compile("[A-Za-z][a-z]{2}")
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[a-zA-Z]*matrix|array)\}(?:\{[lcr|]*\})?(?P<rows>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_OPENING, _CLOSING = "([{", ")]}"


def same_answer(prediction: str, reference: str) -> bool:
    r"""Whether two answers, as text or LaTeX, are equal; an empty answer equals nothing.

    Plain numbers and expressions are compared exactly, words letter by letter, comma-separated values and sets in any
    order, tuples in theirs. No time limit, and the same verdict every time. What cannot be read equals only itself.
    """
    prediction, reference = plain_latex(prediction), plain_latex(reference)
    if not prediction or not reference:
        return False
    try:
        return _same(prediction, reference)
    except RecursionError:  # hundreds of brackets in brackets
        return False


def _same(prediction: str, reference: str) -> bool:
    prediction, reference = prediction.strip(), reference.strip()
    if _without_space(prediction) == _without_space(reference):
        return bool(prediction)
    for decide in (_same_words, _same_based, _same_lists, _same_relations, _same_brackets, _same_matrices):
        verdict = decide(prediction, reference)
        if verdict is not None:
            return verdict
    return _same_quantities(prediction, reference)


def _without_space(text: str) -> str:
    # "1 1/2" must not become "11/2".
    return re.sub(r"(?<![\da-zA-Z])\s+|\s+(?![\da-zA-Z])", "", text)


def _same_words(prediction: str, reference: str) -> bool | None:
    """Letter by letter: as mathematics, words are products of letters and every anagram would be equal."""
    if _SHORT_WORD.fullmatch(prediction) and prediction.lower() == reference.lower():  # yes and Yes
        return bool(_SHORT_WORD.fullmatch(reference))
    if not (_WORDS.fullmatch(prediction) or _WORDS.fullmatch(reference)):
        return None
    if _is_list(prediction) or _is_list(reference):
        return None
    marked = r"\text" in prediction or r"\text" in reference
    words = [
        " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split()).strip("() .") for text in (prediction, reference)
    ]
    if marked:
        words = [word.casefold() for word in words]
    return words[0] == words[1] != ""


def _same_based(prediction: str, reference: str) -> bool | None:
    """A reference in a base wants its digits, with that base or none."""
    expected, predicted = read_based(reference), read_based(prediction)
    if expected is None and predicted is None:
        return None
    if expected is not None and predicted is not None:
        return expected == predicted
    if expected is not None:
        digits = prediction.replace(" ", "")
        return re.fullmatch(r"-?[0-9A-Za-z]+", digits) is not None and digits.upper().lstrip("0") == expected.digits
    number = read_number(reference)
    return predicted is not None and number is not None and number.value == predicted.value


def _is_list(text: str) -> bool:
    return len(_values(text)) > 1


def _same_lists(prediction: str, reference: str) -> bool | None:
    """Comma-separated values and sets in any order; values with plus-minus are two."""
    if read_number(prediction) and read_number(reference):
        return None
    expected, predicted = _values(reference), _values(prediction)
    braces = [_is_set(text) for text in (prediction, reference)]
    if len(expected) == len(predicted) == 1 and not any(braces):
        return None
    if _is_tuple(reference) and len(predicted) > 1 and not any(braces):  # brackets left out
        return _in_order(predicted, _split(reference[1:-1]))
    if _is_tuple(prediction) and len(expected) > 1 and not any(braces):
        return _in_order(_split(prediction[1:-1]), expected)
    for several, other in ((predicted, reference), (expected, prediction)):
        if len(several) > 1 and all(map(_interval_name, several)) and _interval(other):  # x < 1 or x > 2
            return _same_unions(r" \cup ".join(str(_interval(value)) for value in several), str(_interval(other)))
    return _any_order(predicted, expected, _same)


def _is_set(text: str) -> bool:
    return text.startswith(r"\{") and text.endswith(r"\}") and r"\}" not in text[:-2]


def _values(text: str) -> list[str]:
    r"""The values of an answer such as "1, 3", "1 \text{ and } 3" or "\{1, 3\}"; commas in brackets do not separate."""
    if _is_set(text):
        text = text[2:-2]
    if read_number(split_unit(text)[0]):
        return [text]
    text = _CONJUNCTION.sub(",", _COMMA_IN_TEXT.sub(",", text))
    return [each for value in _split(text) for each in _both_signs(value)]


def _both_signs(value: str) -> list[str]:
    if len(re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", value)) == 0 or _split(value.strip("()[] ")) != [
        value.strip("()[] ")
    ]:
        return [value]
    plus = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", value))
    minus = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", value))
    return [re.sub(r"^\s*\+", "", plus), minus]


def _split(text: str, separator: str = ",") -> list[str]:
    """The parts between separators outside of brackets, braces and environments."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if text.startswith((r"\begin", r"\end"), position):
            depth += 1 if text.startswith(r"\begin", position) else -1
        elif text[position] in _OPENING:
            depth += 1
        elif text[position] in _CLOSING:
            depth -= 1
        elif depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position])
            position += len(separator) - 1
            start = position + 1
        position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _any_order(predictions: list[str], references: list[str], same: Callable[[str, str], bool]) -> bool:
    if len(predictions) != len(references):
        return False
    remaining = list(predictions)
    for reference in references:
        match = next((value for value in remaining if same(value, reference)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _in_order(predictions: list[str], references: list[str]) -> bool:
    return len(predictions) == len(references) and all(map(_same, predictions, references))


def _same_relations(prediction: str, reference: str) -> bool | None:
    """Equations, inequalities and membership; a name for its value, an inequality for its interval."""
    predicted, expected = _chain(prediction), _chain(reference)
    if predicted is None and expected is None:
        return None
    intervals = _interval(prediction), _interval(reference)
    if all(intervals):
        names = [_interval_name(text) for text in (prediction, reference)]
        same_names = None in names or names[0] == names[1]
        return same_names and _same_unions(str(intervals[0]), str(intervals[1]))
    named = _assignment(prediction), _assignment(reference)
    if named[0] and named[1]:
        if named[0][0] == named[1][0]:
            return _same(named[0][1], named[1][1])
        return not re.search("[A-Z]{2}", reference) and _same_equations(prediction, reference)
    if expected is None:
        return _same(named[0][1], reference) if named[0] else _same_chain(prediction, reference)
    if predicted is None:
        return _same(prediction, named[1][1]) if named[1] else _same_chain(reference, prediction)
    return _same_equations(prediction, reference)


def _chain(text: str) -> tuple[list[str], list[str]] | None:
    """Terms and relations of "a < b \\le c"; None where there is no relation outside of brackets."""
    terms, relations, depth, start = [], [], 0, 0
    for match in re.finditer(r"\\[a-zA-Z]+|\\.|[(\[{)\]}<>=]", text):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0 and _RELATION.fullmatch(token):
            terms.append(text[start : match.start()].strip())
            relations.append(token)
            start = match.end()
    terms.append(text[start:].strip())
    return (terms, relations) if relations and all(terms) else None


def _assignment(text: str) -> tuple[str, str] | None:
    """The name and the last value of "x = ... = value"."""
    chain = _chain(text)
    if chain is None or set(chain[1]) != {"="} or not _NAME.fullmatch(chain[0][0]):
        return None
    *earlier, last = chain[0][1:]
    return (_without_space(chain[0][0]), last) if all(_same(value, last) for value in earlier) else None


def _same_chain(equation: str, value: str) -> bool:
    """Whether `equation` says two or more times, in different forms, what `value` is: 0.56 = 56%."""
    chain = _chain(equation)
    return chain is not None and set(chain[1]) == {"="} and all(_same(term, value) for term in chain[0])


def _same_equations(prediction: str, reference: str) -> bool:
    """Equations and inequalities up to a factor, a positive one for inequalities, and the side that a term is on."""
    sides = []
    for text in (prediction, reference):
        chain = _chain(text)
        if chain is None or len(chain[1]) != 1 or chain[1][0] == r"\in":
            return False
        (left, right), (relation,) = chain
        if relation in (">", r"\ge"):
            left, right, relation = right, left, _SIDES[relation]
        sides.append((relation, f"({left})-({right})"))
    if sides[0][0] != sides[1][0]:
        return False
    ratio = proportional(sides[0][1], sides[1][1])
    return ratio is not None and (sides[0][0] in ("=", r"\ne") or bool(ratio.is_positive))


def _interval(text: str) -> str | None:
    r"""The interval, or union, that `text` writes as brackets, as an inequality in one name, or after \in."""
    chain = _chain(text)
    if chain is None:
        if r"\cup" in text or (text[:1] in "([" and text[-1:] in ")]" and len(_split(text[1:-1])) == 2):
            return text
        return None
    terms, relations = chain
    if relations == [r"\in"] and _NAME.fullmatch(terms[0]):
        return _interval(terms[1])
    if _interval_name(text) is None or r"\ne" in relations:
        return None
    if relations[0] in (">", r"\ge"):
        terms, relations = terms[::-1], [_SIDES[relation] for relation in relations[::-1]]
    if len(terms) == 3:
        low, high = terms[0], terms[2]
        opening, closing = ("[" if relations[0] == r"\le" else "("), ("]" if relations[1] == r"\le" else ")")
        return f"{opening}{low},{high}{closing}"
    closed = relations[0] == r"\le"
    if _NAME.fullmatch(terms[0]):
        return rf"(-\infty,{terms[1]}{']' if closed else ')'}"
    return rf"{'[' if closed else '('}{terms[0]},\infty)"


def _interval_name(text: str) -> str | None:
    """The name that an inequality bounds by constants, or that is said to be in a set."""
    chain = _chain(text)
    if chain is None:
        return None
    terms, relations = chain
    if relations == [r"\in"]:
        return _without_space(terms[0])
    directions = {_direction(relation) for relation in relations}
    names = [term for term in terms if not is_constant(term)]
    if len(directions) != 1 or 0 in directions or len(names) != 1 or not _NAME.fullmatch(names[0]) or len(terms) > 3:
        return None
    return None if len(terms) == 3 and terms[1] != names[0] else _without_space(names[0])


def _direction(relation: str) -> int:
    return {"<": 1, r"\le": 1, ">": -1, r"\ge": -1}.get(relation, 0)


def _same_unions(prediction: str, reference: str) -> bool:
    parts = [_split(text, r"\cup") for text in (prediction, reference)]
    if _any_order(parts[0], parts[1], _same_interval):
        return True
    return len(parts[0]) + len(parts[1]) > 2 and same_expression(prediction, reference)


def _same_interval(prediction: str, reference: str) -> bool:
    verdict = _same_brackets(prediction, reference)
    return _same(prediction, reference) if verdict is None else verdict


def _is_tuple(text: str) -> bool:
    return _bracketed(text) and text[0] == "(" and text[-1] == ")" and len(_split(text[1:-1])) > 1


def _bracketed(text: str) -> bool:
    r"""Whether a bracket that opens at the start closes at the end."""
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return position == len(text) - 1
    return False


def _same_brackets(prediction: str, reference: str) -> bool | None:
    """Tuples and intervals: the same brackets around the same components in the same order."""
    if r"\cup" in prediction or r"\cup" in reference:
        return _same_unions(prediction, reference)
    inner = []
    for text in (prediction, reference):
        components = _split(text[1:-1]) if _bracketed(text) else []
        inner.append((text[0] + text[-1], components) if len(components) > 1 else None)
    if inner == [None, None]:
        return None
    if inner[0] is None or inner[1] is None:
        return False
    return inner[0][0] == inner[1][0] and _in_order(inner[0][1], inner[1][1])


def _same_matrices(prediction: str, reference: str) -> bool | None:
    matrices = [_MATRIX.fullmatch(text.strip("()[] ")) for text in (prediction, reference)]
    if matrices == [None, None]:
        return None
    if None in matrices:
        return False
    determinants = [match is not None and match["kind"] == "vmatrix" for match in matrices]
    rows = [[_split(row, "&") for row in _split(match["rows"], r"\\")] for match in matrices if match is not None]
    if determinants[0] != determinants[1] or len(rows[0]) != len(rows[1]):
        return False
    return all(map(_in_order, rows[0], rows[1]))


def _same_quantities(prediction: str, reference: str) -> bool:
    """Single values, with or without a unit."""
    (predicted, unit), (expected, expected_unit) = split_unit(prediction), split_unit(reference)
    if not same_unit(unit, expected_unit):
        return False
    numbers = read_number(predicted), read_number(expected)
    if any(number and number.percent and other for number, other in zip(numbers, (expected_unit, unit), strict=True)):
        return False
    if numbers[0] is not None and numbers[1] is not None:
        return same_number(numbers[0], numbers[1])
    if (predicted, expected) != (prediction, reference):
        return _same(predicted, expected)
    if r"\text" in predicted or r"\text" in expected:  # prose is no product of letters
        return False
    parts = _split(predicted, ":"), _split(expected, ":")
    if len(parts[0]) > 1 or len(parts[1]) > 1:
        return _in_order(*parts)
    for number, expression in ((numbers[0], expected), (numbers[1], predicted)):
        if number is not None and not number.percent and is_rounded_to(number, expression):
            return True
    return same_expression(predicted, expected)
