"""Kinds of wrong answers that are close to right ones: what a verifier must not lose in reading."""

import pytest

from eapo_megatron.rewards import math_reward

# (kind, prediction, reference): never equal, in either direction
DIFFERENT = [
    # exact values, however small their difference
    ("exact", r"\frac{1}{2^{80}}", r"\frac{1}{2^{81}}"),
    ("exact", r"2^{-80}", r"2^{-81}"),
    ("exact", r"\frac{1}{21!}", r"\frac{1}{23!}"),
    ("exact", r"\left(\frac{5}{6}\right)^{300}", r"\left(\frac{5}{6}\right)^{299}"),
    ("exact", r"\frac{\binom{70}{2}}{2^{70}}", r"\frac{\binom{70}{3}}{2^{70}}"),
    ("exact", r"\frac{3^{40}-1}{2\cdot 3^{40}}", r"\frac{3^{40}+1}{2\cdot 3^{40}}"),
    ("exact", r"\sqrt{2}+10^{-50}", r"\sqrt{2}"),
    ("exact", r"\pi+2^{-400}", r"\pi"),
    ("exact", r"x+10^{-40}", "x"),
    ("exact", r"10^{-25}x", r"10^{-26}x"),
    ("exact", r"e^{-900}", r"e^{-901}"),
    ("exact", r"(2^{-70}, 1)", r"(2^{-71}, 1)"),
    ("exact", r"[0, 2^{-70}]", r"[0, 2^{-71}]"),
    ("exact", r"\begin{pmatrix} 2^{-70} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2^{-71} \\ 1 \end{pmatrix}"),
    ("exact", r"x = 2^{-70}", r"x = 2^{-71}"),
    ("exact", r"x < 2^{-70}", r"x < 2^{-71}"),
    ("exact", r"(0, 2^{-80}) \cup (1, 2)", r"(0, 2^{-81}) \cup (1, 2)"),
    # small quantities
    ("small", r"1.6\times10^{-19}\text{ C}", r"3.2\times10^{-19}"),
    ("small", r"6.6\times10^{-34}\text{ J s}", r"1.1\times10^{-34}\text{ J s}"),
    ("small", r"0.0\text{ m}", r"8.224\times10^{-19}"),
    ("small", r"0\mathrm{m}", r"4\times10^{-7}"),
    ("small", r"10^{-7}\,\mathrm{m}", r"10^{-8}"),
    ("small", "0", r"\frac{1}{2^{80}}"),
    # decimals that are no rounding, or show too little
    ("rounded", "1.414215", r"\sqrt{2}"),
    ("rounded", "1.41", r"\sqrt{2}"),
    ("rounded", "1.4142", r"\sqrt{2}"),
    ("rounded", "3.14", r"\pi"),
    ("rounded", "0.3333", r"\frac{1}{3}"),
    ("rounded", "0.33333334", r"\frac{1}{3}"),
    ("rounded", r"1.234568 \times 10^{9}", "1234567890"),
    ("rounded", "0.0000000", r"e^{-30}"),
    # units
    ("letters", r"2\pi r", r"2 \pi r h"),
    ("letters", "2 pi r", "2 pi r h"),
    ("letters", "5", "5m"),
    ("letters", "5", "5 m"),
    ("letters", "3a", "3ab"),
    ("letters", "4", "4s"),
    ("letters", "7", "7t"),
    ("units", r"5 \text{ cm}", r"5 \text{ m}"),
    ("units", r"5 \text{ cm}^2", r"5 \text{ cm}"),
    ("units", r"5 \text{ hours}", r"5 \text{ minutes}"),
    ("units", r"\$5", r"5 \text{ euros}"),
    ("units", r"30^\circ", r"30 \text{ cm}"),
    ("units", r"8\!:\!34 \text{ a.m.}", r"8\!:\!34 \text{ p.m.}"),
    ("degrees", r"\tan 15^\circ", r"\tan 15"),
    ("degrees", r"\cos(6^\circ)", r"\cos(7^\circ)"),
    # everything after \mathrm
    ("mathrm", r"\frac{1+\mathrm{i}}{2}", r"\frac{1+\mathrm{i}}{3}"),
    ("mathrm", r"\frac{\mathrm{e}-1}{2}", r"\frac{\mathrm{e}+1}{2}"),
    ("mathrm", r"1-\frac{1}{\mathrm{e}}", r"1-\frac{1}{\mathrm{e}^{3}}"),
    ("mathrm", r"\frac{\mathrm{d}y}{\mathrm{d}x}", r"\frac{\mathrm{d}x}{\mathrm{d}y}"),
    ("mathrm", r"\operatorname{lcm}(2,3)", r"\operatorname{lcm}(2,5)"),
    ("mathrm", r"5 + \text{something}", r"5 + \text{anything}"),
    # bases and other subscripts
    ("base", "204_6", "204_5"),
    ("base", "52_{10}", "52_8"),
    ("base", "1101001_{3}", "1101001_2"),
    ("base", "42", "52_8"),
    ("base", "52_8", "52"),
    ("base", "A5_{12}", r"\text{A5}_{11}"),
    ("index", "x_1", "x_2"),
    ("index", "x_1 + x_2", "x_1 + x_3"),
    ("index", "E_{1},E_{2}", "E_{1},E_{3}"),
    ("index", r"L_{\odot}", "L_{0}"),
    ("index", r"\log_2 3", r"\log_3 2"),
    # primes
    ("prime", "y", "y'"),
    ("prime", "y'", "y''"),
    ("prime", r"y^{\prime}+y=0", "y+y=0"),
    ("prime", "f'(x)", "f(x)"),
    # the case of letters
    ("case", r"\frac{R}{r}", r"\frac{r}{R}"),
    ("case", r"\pi(R^2-r^2)", "0"),
    ("case", "3R^2", "3r^2"),
    ("case", "Mm", "M^2"),
    ("case", r"\Omega", r"\omega"),
    # the order of letters
    ("order", "CD", "DC"),
    ("order", "seat", "east"),
    ("order", r"\text{CBAD}", r"\text{ABCD}"),
    ("order", "LQSX", "LQXS"),
    ("order", "MR=SRMC", "RM=SRMC"),
    ("order", "AB=9, CD=4", "AB=4, CD=9"),
    ("order", r"\triangle ABC", r"\triangle ACB"),
    # lists, brackets, relations
    ("list", "(-6,6), (3,6)", "$(-6,6)$, $(2,6)$"),
    ("list", "(1,2);(3,5)", "(1,2);(3,4)"),
    ("list", r"3 \pm \sqrt{2}", r"3 \pm \sqrt{3}"),
    ("list", "1,2", "(2,1)"),
    ("relation", r"x \le 3", "x < 3"),
    ("relation", "x > 3", "x < 3"),
    ("relation", "x > 3", r"(-\infty, 3)"),
    ("relation", r"1 < x \le 2", "(1,2)"),
    ("relation", "x < 3", "y < 3"),
    ("relation", "x = 5", "y = 5"),
    ("relation", "5x - 7y = 1", "5x + 7y = 1"),
    ("relation", r"s^2 \le 8r^2", r"s^2 \ge 8r^2"),
    ("relation", "2x+1", "2x+1=0"),
    ("relation", r"x \ne 3", "x = 3"),
    ("sets", r"(-\infty,3)\cup(3,\infty)", r"(-\infty,\infty)"),
    ("sets", r"\{1\}", "1,2"),
    ("infinity", r"\infty", r"-\infty"),
    ("infinity", r"\infty", "0"),
    ("constants", r"m c^{2}(\gamma^{2}-1)", r"m c^{2}(\gamma^{2}-2)"),
    ("real", r"\sqrt{x^2}", "x"),
    ("real", "|x|", "x"),
    ("hedging", "x = 6 = 5", "5"),
    ("hedging", r"5 \text{ or maybe 6}", "5"),
    ("hedging", r"5 \text{ if not } 6", "5"),
    ("hedging", r"5 \text{ perhaps 6}", "5"),
    ("hedging", "5, 6", "5"),
    ("percent", r"0.5\%", r"50\%"),
    ("percent", "50", r"0.5"),
    ("percent", r"5\%", r"5 \text{ cm}"),
    ("ratio", "1:4", "4:1"),
    ("words", r"\text{A, B}", r"\text{A, C}"),
    ("repeating", r"0.\overline{3}", "0.3"),
    ("mixed", r"1\frac{1}{2}", r"\frac{11}{2}"),
    ("mixed", r"2\frac{1}{3}", r"\frac{2}{3}"),
    ("parsing", r"\frac{1}{0}", r"\frac{2}{0}"),
    ("parsing", "x+", "x"),
    ("parsing", "2+3)", "5"),
    ("parsing", "((((" * 200, "5"),
]


@pytest.mark.parametrize(("kind", "prediction", "reference"), DIFFERENT)
def test_never_equal(kind: str, prediction: str, reference: str) -> None:
    assert math_reward(rf"Hence \boxed{{{prediction}}}.", reference) == -1.0
    assert math_reward(rf"Hence \boxed{{{reference}}}.", prediction) == -1.0 or kind in ("percent", "base")


@pytest.mark.parametrize("text", sorted({text for _, *pair in DIFFERENT for text in pair if "((" not in text}))
def test_each_equals_itself(text: str) -> None:
    assert math_reward(rf"Hence \boxed{{{text}}}.", text) == 1.0
