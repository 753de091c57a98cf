import time

import pytest

from eapo_megatron.rewards import extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{5} no, \boxed{6}", "6"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} \boxed{", r"\left\{ x \right."),
        (r"\boxed{\boxed{8}}", "8"),
        (r"\boxed{3} and then \boxed{4 was cut", "3"),
        (r"\boxed{3} {unbalanced \boxed{4} and more", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{9} \boxed{ }", ""),
        (r"\boxed{}" + "\n#### 3", ""),
        ("text } } \\boxed{2}", "2"),
        (r"a \\{ b \boxed{2}", "2"),
        ("work\n#### 72", "72"),
        ("#### 1\n#### 1,234", "1,234"),
        ("#### -3.5", "-3.5"),
        ("####$18", "$18"),
        ("#### 1/2", "1/2"),
        ("#### 25%", "25%"),
        ("1+2=3. #### 3", "3"),
        ("#### 42 apples", "42"),
        ("#### 7.", "7"),
        ("#### 5, that is", "5"),
        ("#### 2. Solve it\nThe answer is 11.", "11"),
        ("#### Conclusion\nThe answer is 12", "12"),
        (r"#### 4" + "\n" + r"\boxed{5}", "5"),
        ("The answer is 5. The answer is 6.", "6"),
        ("the final answer is: 3.25. Done", "3.25"),
        ("**The answer is 14**", "14"),
        ("The answer is $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
        ("The answer is x = 2\nand so on", "x = 2"),
        ("The final answer is:\n\n15\n\nDone", "15"),
        ("The answer is", ""),
        ("I do not know", None),
        ("", None),
        (r"\boxed{never closed", None),
        ("5", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "####", "the answer is ", "#### 1,", "\\", "}", "1" * 10])
def test_time_is_linear_in_a_hostile_response(piece: str) -> None:
    started = time.perf_counter()
    extract_answer(piece * 30_000)
    assert time.perf_counter() - started < 2.0
