"""Benchmark files: what is read, and what is left out by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.evaluation.benchmarks import BENCHMARKS, load_benchmark, named
from eapo_megatron.rewards.choice import choice_reward


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_papers_numbers_of_responses() -> None:
    ns = {name: benchmark.n for name, benchmark in BENCHMARKS.items() if name != "mmlu_pro"}
    assert ns == {"aime24": 32, "aime25": 32, "amc": 32, "math500": 4, "minerva": 4, "olympiad": 4}


def test_names_are_known_and_once() -> None:
    assert [benchmark.name for benchmark in named(["amc", "aime24"], key="--benchmarks")] == ["amc", "aime24"]
    with pytest.raises(RecipeError, match=r"'aime23' is none of aime24, aime25"):
        named(["amc", "aime23"], key="--benchmarks")
    with pytest.raises(RecipeError, match="amc is there twice"):
        named(["amc", "amc"], key="--benchmarks")


def test_numbers_lists_and_text_are_answers(tmp_path: Path) -> None:
    records = [{"problem": "a", "answer": 142.0}, {"problem": "b", "answer": ["9.6\n", "10"]}]
    (tmp_path / "test_amc.json").write_text(json.dumps([*records, {"problem": "c", "answer": r"\frac{1}{2}"}]))
    problems = load_benchmark(BENCHMARKS["amc"], tmp_path, key="--data")
    assert {index: example.answer for index, example in problems.examples.items()} == {
        0: "142",
        1: ["9.6", "10"],
        2: r"\frac{1}{2}",
    }
    assert problems.left_out == []


def test_records_that_cannot_be_used_are_named_by_line_and_the_others_keep_their_index(tmp_path: Path) -> None:
    wrong = [{"problem": "no answer"}, {"answer": "3"}, {"problem": "null", "answer": None}]
    wrong += [{"problem": "empty", "answer": []}, {"problem": "an object", "answer": {"x": 1}}]
    wrong += [{"problem": "a lone brace", "answer": "1}"}, {"problem": " ", "answer": "1"}]
    write(tmp_path / "math500.jsonl", [{"problem": "a", "answer": "1"}, *wrong, {"problem": "b", "answer": "2"}])
    problems = load_benchmark(BENCHMARKS["math500"], tmp_path, key="--data")
    assert list(problems.examples) == [0, 8]
    assert len(problems.left_out) == 7
    for line, (said, about) in enumerate(
        zip(problems.left_out, ["answer", "problem", "answer", "answer", "answer", "'1}'", "blank"], strict=True), 2
    ):
        assert f"line {line}:" in said
        assert about in said


def test_multiple_choice_has_lettered_options(tmp_path: Path) -> None:
    good = {"question": "Which?", "options": ["one", "two", "three"], "answer": "C", "answer_index": 2}
    write(tmp_path / "mmlu_pro.jsonl", [good, good | {"answer": "D"}, good | {"options": "one"}, {"question": "Why?"}])
    problems = load_benchmark(BENCHMARKS["mmlu_pro"], tmp_path, key="--data")
    assert problems.examples[0].prompt == (
        "Which?\n\nA. one\nB. two\nC. three\n\nAnswer with the letter of the right option."
    )
    assert problems.examples[0].answer == "C"
    assert [said.partition(": ")[2] for said in problems.left_out] == [
        "answer must be a letter from A to C, got 'D'",
        "options must be a list of 2 to 26 texts",
        "options must be a list of 2 to 26 texts",
    ]


def test_options_of_mmlu_pro(tmp_path: Path) -> None:
    """Its records repeat the answer as a place, and some pad their options."""
    record = {"question": "Which?", "options": ["one", "two", "N/A", "N/A"], "answer": "B", "answer_index": 1}
    write(tmp_path / "mmlu_pro.jsonl", [record, record | {"answer_index": 0}, record | {"answer": "C"}])
    problems = load_benchmark(BENCHMARKS["mmlu_pro"], tmp_path, key="--data")
    assert str(problems.examples[0].prompt).startswith("Which?\n\nA. one\nB. two\n\nAnswer with")
    assert [said.partition(": ")[2] for said in problems.left_out] == [
        "answer B is option 1, its answer_index is 0",
        "answer must be a letter from A to B, got 'C'",
    ]


@pytest.mark.parametrize(
    "given",
    [
        r"\boxed{C}",
        r"so \boxed{\text{(C)}}",
        "The answer is C.",
        r"\boxed{C. three}",
        r"\boxed{\textbf{C}}",
        "Answer: (C)",
    ],
)
def test_a_right_letter(given: str) -> None:
    assert choice_reward(given, "C") == 1
    assert choice_reward(given, "D") == -1


@pytest.mark.parametrize(
    "given", ["C", r"\boxed{c}", r"\boxed{Cobalt}", r"\boxed{three}", r"\boxed{A, C}", r"\boxed{}"]
)
def test_what_is_no_letter_is_wrong(given: str) -> None:
    assert choice_reward(given, "C") == -1


def test_one_file_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has none of amc.jsonl, .*test_amc.parquet: amc needs one file"):
        load_benchmark(BENCHMARKS["amc"], tmp_path, key="--data")
    for name in ("amc.jsonl", "test_amc.jsonl"):
        write(tmp_path / name, [{"problem": "a"}])
    with pytest.raises(RecipeError, match=r"has amc.jsonl and test_amc.jsonl"):
        load_benchmark(BENCHMARKS["amc"], tmp_path, key="--data")
    (tmp_path / "amc.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"no usable problem \(.*line 1: no answer"):
        load_benchmark(BENCHMARKS["amc"], tmp_path, key="--data")
