"""Gold answers as the benchmarks write them: each verifies itself, and none with a number of it changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eapo_megatron.data import Example
from eapo_megatron.evaluation.benchmarks import BENCHMARKS, LETTERS, load_benchmark
from eapo_megatron.rewards import math_reward
from eapo_megatron.rewards.choice import choice_reward

# Answers in each benchmark's own manner: whole numbers, floats, LaTeX, units and powers of ten, lists of alternatives.
ANSWERS: dict[str, list[Any]] = {
    "aime24": ["204", "025", 73, "033"],
    "aime25": ["70", "588", "016"],
    "amc": [142.0, 27.0, 0.5, -3.0, 1625.25],
    "math500": [
        r"\left( 3, \frac{\pi}{2} \right)",
        r"\frac{14}{3}",
        r"11\sqrt2",
        r"90^\circ",
        r"x \in [-2,7]",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        "6 - 5i",
        r"10\%",
        "1,-2",
        r"2516_8",
        r"\$32,\!348",
        r"3R^2",
        "(-\\infty, 2) \\cup (3, \\infty)",
        "5.4 \\text{ cents}",
    ],
    "minerva": [["9.6"], ["1.6e33"], ["4.5e33"], [r"8.7e8"], ["0.36"], [r"I(0) e^{-\frac{t}{5 C}}"], ["3.3e12"]],
    "olympiad": [
        ["2"],
        [r"$\frac{1}{2 n+2}$"],
        ["$(-7,4)$, $(4,12)$"],
        [r"$\frac{13}{2}$", "6.5"],
        ["$4 \\sqrt{7}$"],
        ["171"],
    ],
}
NUMBER = re.compile(r"\d+")


def problems_of(name: str, folder: Path) -> dict[int, Example]:
    records = [{"problem": f"Problem {i}", "answer": answer} for i, answer in enumerate(ANSWERS[name])]
    (folder / f"test_{name}.json").write_text(json.dumps(records))
    problems = load_benchmark(BENCHMARKS[name], folder, key="--data")
    assert problems.left_out == []
    assert len(problems.examples) == len(records)
    return problems.examples


def changed(answer: str) -> Iterator[str]:
    """The answer with one of its numbers one larger, with a digit more in front, or with another first digit."""
    for found in NUMBER.finditer(answer):
        digits = found.group()
        others = {str(int(digits) + 1).zfill(len(digits)), "1" + digits, str(int(digits[0]) % 9 + 1) + digits[1:]}
        for other in sorted(others - {digits}):
            yield answer[: found.start()] + other + answer[found.end() :]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_changed_number_never_verifies(name: str, tmp_path: Path) -> None:
    checked = 0
    for example in problems_of(name, tmp_path).values():
        accepted = [example.answer] if isinstance(example.answer, str) else example.answer
        for answer in accepted:
            assert math_reward(rf"Hence the answer is $\boxed{{{answer}}}$.", example.answer) == 1.0, answer
            for other in changed(answer):
                given = rf"Hence the answer is $\boxed{{{other}}}$."
                assert math_reward(given, example.answer) == -1.0, f"{other} passes for {example.answer}"
                checked += 1
    assert checked >= 2 * len(ANSWERS[name])


def test_no_letter_but_the_right_one_verifies(tmp_path: Path) -> None:
    options = [f"{i} cm" for i in range(10)]
    records = [{"question": f"{i}?", "options": options, "answer": letter} for i, letter in enumerate(LETTERS[:10])]
    (tmp_path / "mmlu_pro.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    examples = load_benchmark(BENCHMARKS["mmlu_pro"], tmp_path, key="--data").examples
    for index, example in examples.items():
        for number, letter in enumerate(LETTERS[:10]):
            for given in (letter, f"({letter})", f"{letter}. {options[number]}"):
                assert choice_reward(rf"It is \boxed{{{given}}}.", str(example.answer)) == (
                    1 if number == index else -1
                )
