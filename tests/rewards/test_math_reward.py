import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.rewards import math_reward


def reward(prediction: str, answer: str | list[str] | float | int) -> float:
    return math_reward(rf"Therefore \boxed{{{prediction}}}.", answer)


EQUAL = [
    # plain numbers
    ("142", 142.0),
    ("142.0", 142),
    ("-3", -3),
    ("0.5", 0.5),
    ("025", "25"),
    ("25", "025"),
    ("+7", "7"),
    (".5", "1/2"),
    ("1,234,567", "1234567"),
    (r"10,\!080", "10080"),
    (r"1{,}000", "1000"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{6}{8}", r"\tfrac{3}{4}"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    (r"\frac12", r"\frac{1}{2}"),
    ("8.7e8", r"8.7 \times 10^{8}"),
    (r"3.89 \times 10^{-10}", "3.89e-10"),
    ("- 5", "-5"),
    ("5.", "5"),
    ("$5$", "5"),
    (r"\(5\)", "5"),
    (r"\$32", "32"),
    ("9.6", ["9.6\n"]),
    # mixed numbers, roots, constants
    (r"1\frac{1}{2}", "1.5"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"4\pi", r"\pi \cdot 4"),
    ("2^{10}", "1024"),
    (r"\binom{5}{2}", "10"),
    # expressions and equations
    ("-q + p", "p - q"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("2x+1", "y=2x+1"),
    (r"x \le 3", r"x \leq 3"),
    ("-5i+6", "6 - 5i"),
    # units, percent, degrees, bases
    (r"5 \text{ cm}", "5"),
    ("5", r"5 \text{ cm}"),
    (r"12\pi\text{ cm}^2", r"12 \pi"),
    (r"50\%", "50"),
    ("50%", "0.5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"),
    # tuples, intervals, sets, matrices
    (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\left[0.5, 8\right]", r"[\frac{1}{2}, 8]"),
    ("(-1, 2]", "(-1,2]"),
    (r"\{1\} \cup (-\infty, 0)", r"$(-\infty, 0) \cup\{1\}$."),
    (r"\{2, 1\}", r"\{1,2\}"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    # several values, any order
    ("5,3,1", "1,3,5"),
    (r"1, 3 \text{ and } 5", "1,3,5"),
    ("x=1 or x=3", "1,3"),
    (r"\{5, 3, 1\}", ["1,3,5"]),
    (r"\pm 2", "2,-2"),
    ("84, 69", ["$69$,$84$"]),
    ("8, 221", ["$221,$8$"]),
    ("(3,2), (1,1)", ["$(1,1), (3,2)$"]),
    (r"1/2, \frac{32}{9}", [r"$\frac{32}{9}$,$\frac{1}{2}$"]),
    ("f(x)=2-x, f(x)=x", ["$f(x)=x$,$f(x)=2-x$"]),
    # any element of a list
    ("0.02", ["0.01\n", "0.02\n"]),
    ("6630", ["6630.65\n", "6630\n"]),
    (r"\arcsin{\frac{10}{13}}", [r"\arcsin{\frac{1}{1.3}}", "\\arcsin{\\frac{10}{13}}\n"]),
    # words
    ("Evelyn", r"\text{Evelyn}"),
    (r"\text{even}", r"\text{Even}"),
    ("C", r"\text{(C)}"),
    (r"\text{(C)}", "C"),
]

DIFFERENT = [
    ("143", 142.0),
    ("142.000001", 142.0),
    ("0.333333", "1/3"),
    ("1234", "12345"),
    ("1 1/2", "11/2"),
    ("1e-9", "0"),
    ("0", r"3.61 \times 10^{-10}"),
    ("1/0", "1"),
    ("1e999999999", "1"),
    ("0.5", "50"),
    ("5x", "5"),
    ("5 or 6", "5"),
    ("5, 6", "5"),
    (r"5 \text{ or } 6", "5"),
    (r"\{5, 6\}", "5"),
    ("x=5, x=6", "5"),
    ("5=6", "5"),
    (r"5 \pm 1", "6"),
    (r"x \ge 5", "5"),
    ("(0,1]", "(0,1)"),
    ("(4,2)", "(2,4)"),
    ("1,3", "1,3,5"),
    ("1,3,5,7", "1,3,5"),
    ("1,1,3", "1,3,5"),
    ("(1,2),(3,4)", "(1,2)"),
    ("0.03", ["0.01", "0.02"]),
    ("0.01, 0.02", ["0.01", "0.02"]),
    ("seat", r"\text{east}"),
    ("odd", r"\text{even}"),
    (r"\text{the answer is } 5 \text{ or maybe } 6", "6"),
    ("", "5"),
    (" ", "5"),
    ("$$", "5"),
    ("", ""),
    ("5", ""),
    ("5", []),
    ("5", ["", " "]),
    (r"\frac{1}", "1"),
    (r"\sqrt{", "2"),
    ("0" * 1000 + "5", "5"),
]


@pytest.mark.parametrize(("prediction", "answer"), EQUAL)
def test_equal_answers(prediction: str, answer: str | list[str] | float | int) -> None:
    assert reward(prediction, answer) == 1.0


@pytest.mark.parametrize(("prediction", "answer"), DIFFERENT)
def test_different_answers(prediction: str, answer: str | list[str] | float | int) -> None:
    assert reward(prediction, answer) == -1.0


def test_only_the_last_of_several_answers_counts() -> None:
    assert math_reward(r"\boxed{4} or \boxed{5}", "5") == 1.0
    assert math_reward(r"\boxed{5} or \boxed{4}", "5") == -1.0
    assert math_reward(r"\boxed{5}, \boxed{}", "5") == -1.0
    assert math_reward("#### 5\n#### 4", "5") == -1.0


def test_no_answer_is_wrong() -> None:
    assert math_reward("5", "5") == -1.0
    assert math_reward("", "5") == -1.0


def test_answer_longer_than_any_reference_is_wrong() -> None:
    assert reward("0" * 999 + "5", "5") == 1.0
    assert reward("0" * 1000 + "5", "5") == -1.0


@pytest.mark.parametrize(
    "piece",
    ["a", "1", "(", "{", "(1,", r"\{", r"\text{a} ", r"\text{m}/", "1,000,", " 1", "x_1", "x^", r"\frac", r"\sqrt1",
     "=", "<", "'", r"\pm ", "0.3", "1/", r"\cup ", "aaaa ", "i", "AB", r"\begin{pmatrix}", r"\left", "|x|", "ab+",
     "e", "%", "_{", "or "],
)  # fmt: skip
def test_hostile_answers_are_decided_soon(piece: str) -> None:
    answer = (piece * 400)[:400] + "+y"
    started = time.perf_counter()
    for reference in ("5", "[0,1]"):
        reward(answer, reference)
    assert time.perf_counter() - started < 10.0


@pytest.mark.parametrize("answer", [None, math.nan, math.inf, True, {"a": 1}, [None]])
def test_reference_of_a_wrong_type(answer: object) -> None:
    with pytest.raises(ValueError, match="answer must be text, a finite number or a list of these"):
        reward("5", answer)  # type: ignore[arg-type]


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_are_compared_exactly(first: Fraction, second: Fraction) -> None:
    written = rf"\frac{{{first.numerator}}}{{{first.denominator}}}"
    assert reward(written, f"{second.numerator}/{second.denominator}") == (1.0 if first == second else -1.0)
    assert reward(written, f"{7 * first.numerator}/{7 * first.denominator}") == 1.0


@given(st.integers(-(10**12), 10**12), st.integers(-3, 3))
def test_thousands_commas(number: int, difference: int) -> None:
    assert reward(f"{number + difference:,}", number) == (1.0 if difference == 0 else -1.0)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_several_values_match_as_multisets(values: list[int], random) -> None:
    shuffled = random.sample(values, len(values))
    reference = ", ".join(map(str, values))
    assert reward(", ".join(map(str, shuffled)), reference) == 1.0
    shuffled[0] += 1
    assert reward(", ".join(map(str, shuffled)), reference) == -1.0
