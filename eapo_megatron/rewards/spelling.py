r"""One spelling for what people and models write in many: an answer as text or LaTeX -> plain LaTeX.

Only spellings are changed, never values: what this module does not know stays as it is. The result knows one kind of
fraction (\frac with braces), one minus, one degree sign (^{\circ}), one text command (\text), no sizes of brackets, no
math mode and no LaTeX spaces; digits stand without group marks and mixed numbers as sums.
"""

# ruff: noqa: RUF001 - characters that look like others are what it is about

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
_SPACES = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
# Pairs: a character, and what it is spelled like here.
_SYMBOL_PAIRS = r"""
− -  – -  — -  ‐ -  ‑ -  ‒ -  ﹣ -  － -  ＋ +  ＝ =  × \times  ✕ \times  · \cdot  ⋅ \cdot  ∙ \cdot  ÷ /  ∕ /  ⁄ /
± \pm  ∓ \mp  √ \sqrt  ∛ \sqrt[3]  ∜ \sqrt[4]  ∞ \infty  ° ^{\circ}  º ^{\circ}  ˚ ^{\circ}  ′ '  ’ '  ʹ '  ″ ''
≤ \le  ⩽ \le  ≥ \ge  ⩾ \ge  ≠ \ne  ≈ \approx  ∪ \cup  ∩ \cap  ∖ \setminus  ∈ \in  ∉ \notin  ∅ \emptyset
⊆ \subseteq
ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}  ℂ \mathbb{C}  ℏ \hbar  ⅈ i  ∠ \angle  △ \triangle
… \ldots  ⋯ \ldots  ⌊ \lfloor  ⌋ \rfloor  ⌈ \lceil  ⌉ \rceil  ∶ :  ： :  ， ,  （ (  ） )  ％ %  ϕ \phi  ϵ \epsilon
¢ \text{cents}  € \text{euros}  £ \text{pounds~sterling}  ¥ \text{yen}  ₹ \text{rupees}
"""
_SYMBOLS = _SYMBOL_PAIRS.split()
_CODES = {
    **{
        ord(character): latex + " " * latex[-1].isalpha()
        for character, latex in zip(_SYMBOLS[::2], _SYMBOLS[1::2], strict=True)
    },
    **_INVISIBLE,
    **_SPACES,
}
_SUPERSCRIPTS = {ord(c): p for c, p in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True)}
_SUBSCRIPTS = {ord(c): p for c, p in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}

_REPLACED = [
    (r"\.\.\.", r"\\ldots "),
    (r"\$\s*,\s*\$|\\\)\s*,\s*\\\(", ", "),  # "$1$,$200$" is no number with a thousands comma
    (r"\\\$", r"\\text{dollars}"),
    (r"\$|(?<!\\)\\[()\[\]]", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|boxed|fbox|mathstrut|strut)(?![a-zA-Z])", ""),
    (r"\\v?phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
    (r"(?<!\\)\\!|\{\s*\\!\s*\}", ""),
    # A doubled backslash ends a row of a matrix.
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z])|enspace(?![a-zA-Z])|thinspace(?![a-zA-Z]))|~", " "),
    (r"\{([,:])\}", r"\1"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:mathrm|text|textrm|textnormal|mbox|operatorname|rm)\s*\{\s*([ied])\s*\}", r"\1"),
    (r"\\operatorname\s*\{\s*((?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|det|gcd|max|min)\s*\}", r"\\\1 "),
    (r"\\(?:mathrm|textrm|textnormal|textbf|textit|textsf|texttt|mbox|hbox|operatorname)\s*\{", r"\\text{"),
    (r"\\text\s+\{", r"\\text{"),
    (r"\\text\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}", r"\1"),  # choices: \text{A, C}
    (r"\\text\{\s*(?:%|percent)\s*\}|\\%|(?<=\d)\s*percent\b", "%"),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<", r"\\le "),
    (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:lbrack)(?![a-zA-Z])", "["),
    (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
    (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<![a-zA-Z\\])(pi|sqrt|theta)(?![a-zA-Z])", r"\\\1 "),
    (
        r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))|\\(?:degree|textdegree)(?![a-zA-Z])",
        r"^{\\circ}",
    ),
    (r"\^\s*\{\s*((?:\\prime\s*)+)\}", lambda match: "'" * match[1].count("prime")),
    (r"\^\s*\\prime(?![a-zA-Z])", "'"),
    (r"^\s*([a-zA-Z])\s*\\approx(?![a-zA-Z])", r"\1 ="),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\\(?:dotsc?|cdots|ldots)(?![a-zA-Z])", r"\\ldots "),
]
_RULES: list[tuple[re.Pattern[str], Any]] = [(re.compile(pattern), replacement) for pattern, replacement in _REPLACED]

_SEPARATED_GROUPS = re.compile(r"(?<![\d.,^_{])(\d{1,3}(?: \d{3})+)(?![\d/]| *\\frac| +\d)")
_NARROW_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;:]|\\ |[\u00a0\u2009\u202f])\d{3})+(?!\d)")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PARENTHESISED_ROOT = re.compile(r"(\\sqrt\s*(?:\[[^\[\]]*\])?)\s*\(([^()]*)\)")
_MIXED = re.compile(
    r"(?<![\w.}^_)\\])(\d+) *\\frac\{(\d+)\}\{(\d+)\}(?!\s*[\^!])|(?<![\w.}^_)\\/])(\d+) +(\d+)/(\d+)(?![\w.])"
)
_WORD = re.compile(r"\\[a-zA-Z]+|(?<![a-zA-Z])[a-zA-Z]{4,}(?![a-zA-Z])")
# LaTeX takes one digit; whoever writes x^10 means ten.
_INDEX = re.compile(r"([\^_])\s*(\\frac\{[^{}]*\}\{[^{}]*\}|\\[a-zA-Z]+(?![a-zA-Z{])|[-+]?[0-9]+|[a-zA-Z])")
_PARENTHESISED_INDEX = re.compile(r"\^\s*\(([^()]*)\)")
_ARGUMENT = re.compile(r"\\[a-zA-Z]+|[0-9a-zA-Z]")


def plain_latex(answer: str) -> str:
    """`answer` in the one spelling of this module, without a full stop at its end."""
    answer = _without_unicode(_NARROW_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), answer))
    for pattern, replacement in _RULES:
        answer = pattern.sub(replacement, answer)
    answer = _PARENTHESISED_ROOT.sub(r"\1{\2}", answer)
    answer = _braced(answer)
    answer = _SEPARATED_GROUPS.sub(lambda match: match[0].replace(" ", ""), " ".join(answer.split()))
    answer = _MIXED.sub(_sum, answer)
    answer = _words_marked(answer)
    answer = re.sub(r"^\\approx\s*|(?<=\S)\s*\\approx.*$", "", answer)
    return answer.strip().rstrip(".,;").strip()


def without_groups(number: str) -> str:
    """The digits of a number without its thousands commas."""
    return _COMMA_GROUPS.sub(lambda match: match[0].replace(",", ""), number)


def _without_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("√ *([0-9]+|[a-zA-Z])", r"\\sqrt{\1}", text)
    return "".join(_latex_of(character) for character in text.translate(_CODES))


def _latex_of(character: str) -> str:
    if character.isascii():
        return character
    name = unicodedata.name(character, "")
    if name.startswith("VULGAR FRACTION"):
        value = Fraction(unicodedata.numeric(character)).limit_denominator(10)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if name.startswith("GREEK "):
        letter = name.split()[-1].lower()
        return f"\\{letter.capitalize() if 'CAPITAL' in name else letter} "
    return unicodedata.normalize("NFKC", character)  # full-width digits and letters


def _braced(text: str) -> str:
    r"""Braces around the arguments of \frac, \binom and \sqrt, around exponents and indices: \frac12, \sqrt2, x^10."""
    text = _PARENTHESISED_INDEX.sub(r"^{\1}", text)
    text = _INDEX.sub(r"\1{\2}", text)
    pieces, position = [], 0
    for match in re.finditer(r"\\(frac|binom|sqrt)(?![a-zA-Z])", text):
        if match.start() < position:
            continue
        end = match.end()
        pieces.append(text[position:end])
        if match[1] == "sqrt" and (degree := re.match(r"\s*\[[^\[\]]*\]", text[end:])):
            pieces.append(degree[0].strip())
            end += degree.end()
        for _ in range(1 if match[1] == "sqrt" else 2):
            end += len(text[end:]) - len(text[end:].lstrip())
            if text[end : end + 1] == "{":
                closing = matching_brace(text, end)
                if closing is None:
                    break
                pieces.append("{" + _braced(text[end + 1 : closing]).strip() + "}")
                end = closing + 1
            elif argument := _ARGUMENT.match(text, end):
                pieces.append("{" + argument[0] + "}")
                end = argument.end()
        position = end
    return "".join(pieces) + text[position:]


def matching_brace(text: str, start: int) -> int | None:
    """Where the brace that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _sum(match: re.Match[str]) -> str:
    whole, top, bottom = match.groups()[:3] if match[1] else match.groups()[3:]
    if int(top) >= int(bottom):
        return match[0]
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})"


def _words_marked(text: str) -> str:
    r"""Words of four letters or more as \text{...}: nobody writes products of so many variables as a word."""
    pieces, position = [], 0
    while match := _WORD.search(text, position):
        if match[0].startswith("\\"):
            end = match.end()
            if match[0] in (r"\text", r"\begin", r"\end", r"\mathbb") and text[end : end + 1] == "{":
                end = (matching_brace(text, end) or end) + 1
            pieces.append(text[position:end])
        else:
            end = match.end()
            pieces.append(text[position : match.start()] + rf"\text{{{match[0]}}}")
        position = end
    return "".join(pieces) + text[position:]
