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
        (r"$\boxed 5$", "5"),
        (r"\boxed5", "5"),
        (r"\fbox{42}", "42"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1}. Then \boxed{2}", "2"),
        ("So it is 42.\n\nAnswer: $42$", "$42$"),
        ("Final Answer: **42**", "42"),
        ("**Answer:** 7", "7"),
        ("**Final Answer**: 7.", "7"),
        ("Answer\uff1a8", "8"),
        ("Answer: 3\nThe answer is 4", "4"),
        ("The correct answer is 42.", "42"),
        ("My answer: 3", None),
        ("Answer: $11,\\! 111$", "$11,\\! 111$"),
        ("#### $18$", "18"),
        ("#### **18**", "18"),
        ("#### \u22125", "\u22125"),
        ("<answer>42</answer>", "42"),
        (r"\boxed{1}<answer> **2** </answer>", "2"),
        (r"<answer>so \boxed{3}</answer>", "3"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        (r"<think>6 times 7 is \boxed{41}</think>\boxed{42}", "42"),
        (r"<think>6 times 7 is \boxed{41}</think> I do not know", None),
        (r"<think>6 times 7 is \boxed{42}", None),
        (r"6 times 7 is \boxed{41}</think>\boxed{42}", "42"),
        (r"<think>a</think>\boxed{1}<think>\boxed{2}", None),
        ("5", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "auto", "opened", "none"),
    [
        (r"\boxed{1}", "1", None, "1"),
        (r"\boxed{1}</think>\boxed{2}", "2", "2", "2"),
        (r"\boxed{1}</think>", None, None, "1"),
        (r"<think>\boxed{1}", None, None, "1"),
        (r"<think></think>\boxed{1}", "1", "1", "1"),
    ],
)
def test_thinking(response: str, auto: str | None, opened: str | None, none: str | None) -> None:
    assert extract_answer(response) == auto
    assert extract_answer(response, thinking="opened") == opened
    assert extract_answer(response, thinking="none") == none


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        "{",
        "####",
        "the answer is ",
        "Answer: ",
        "<answer>",
        "<think>",
        r"\boxed5",
        r"\boxed{1} and ",
        "#### $",
        "**",
        "#### 1,",
        "\\",
        "}",
        "1" * 10,
    ],
)
def test_time_is_linear_in_a_hostile_response(piece: str) -> None:
    started = time.perf_counter()
    extract_answer(piece * 30_000)
    assert time.perf_counter() - started < 2.0
