"""The benchmarks of the paper by name: their files of problems and answers, and how many responses a problem gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapo_megatron.config import RecipeError
from eapo_megatron.data import DataError, Example, examples_of
from eapo_megatron.data.record_files import read_records
from eapo_megatron.evaluation.hub import SUFFIXES, hub_records
from eapo_megatron.reading import naming_files
from eapo_megatron.rewards import math_reward
from eapo_megatron.rewards.mathematics import CORRECT

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PADDING = "N/A"  # an option of MMLU-Pro that is none
CHOICE_REWARD = "eapo_megatron.rewards.choice:choice_reward"


@dataclass(frozen=True)
class Benchmark:
    """What is asked: `n` responses a problem by default; `choices`: lettered options, and the answer is a letter."""

    name: str
    n: int
    choices: bool = False


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", 32),
        Benchmark("aime25", 32),
        Benchmark("amc", 32),
        Benchmark("math500", 4),
        Benchmark("minerva", 4),
        Benchmark("olympiad", 4),
        Benchmark("mmlu_pro", 4, choices=True),
    )
}


@dataclass(frozen=True)
class Problems:
    """A benchmark's problems by their place in the file, from 0, and one sentence on each record that is left out."""

    benchmark: Benchmark
    examples: dict[int, Example]
    left_out: list[str]


def named(names: Sequence[str], *, key: str) -> list[Benchmark]:
    """The benchmarks of these names, which `key` gives.

    Raises:
        RecipeError: naming the first that is not known or is there twice, and all that are known.
    """
    found: list[Benchmark] = []
    for name in names:
        if name not in BENCHMARKS:
            raise RecipeError(f"{key}: {name!r} is none of {', '.join(BENCHMARKS)}")
        if BENCHMARKS[name] in found:
            raise RecipeError(f"{key}: {name} is there twice")
        found.append(BENCHMARKS[name])
    return found


def load_benchmark(benchmark: Benchmark, folder: Path | None, *, key: str) -> Problems:
    """Reads NAME or test_NAME, .jsonl, .json or .parquet, from the folder that `key` gives; None: from the hub.

    Records have `problem` and `answer` (text, a number, or a list of which any is accepted); those of multiple choice
    `question`, `options` (a list of texts) and `answer`, the letter of the right one, which `answer_index` repeats as
    its place where there is one. A record that lacks one of these, or whose answer the verifier does not accept as the
    answer to itself, is left out and named.

    Raises:
        RecipeError: naming the folder, the file or the hub's data set: when there is no file or more than one, it
            cannot be read, or no record of it can be used.
    """
    examples: dict[int, Example] = {}
    left_out: list[str] = []
    if folder is None:
        source, records = f"{benchmark.name} of the Hugging Face hub", hub_records(benchmark.name)
    else:
        path = _file(benchmark, folder, key)
        source, records = str(path), read_records(path)
    for index, (where, record) in enumerate(records):
        try:
            examples[index] = _choice(record, where) if benchmark.choices else _mathematics(record, where)
        except DataError as error:
            left_out.append(str(error))
    if not examples:
        raise RecipeError(f"{source}: no usable problem ({left_out[0] if left_out else 'the file is empty'})")
    return Problems(benchmark, examples, left_out)


def _file(benchmark: Benchmark, folder: Path, key: str) -> Path:
    names = [prefix + benchmark.name + suffix for prefix in ("", "test_") for suffix in SUFFIXES]
    with naming_files(folder):
        if not folder.is_dir():
            raise RecipeError(f"{key} {folder} is not a folder")
        there = [folder / name for name in names if (folder / name).exists()]
    if len(there) != 1:
        what = f"has {' and '.join(path.name for path in there)}" if there else f"has none of {', '.join(names)}"
        raise RecipeError(f"{key} {folder} {what}: {benchmark.name} needs one file")
    return there[0]


def _mathematics(record: dict[str, Any], where: str) -> Example:
    for field in ("problem", "answer"):
        if record.get(field) in (None, "", []):
            raise DataError(f"{where}: no {field}")
    example = examples_of([(where, record)], source=where, prompt_field="problem", answer_field="answer").examples[0]
    for answer in _answers(example):
        if math_reward(f"The answer is $\\boxed{{{answer}}}$.", answer) != CORRECT:
            raise DataError(f"{where}: the answer {answer[:60]!r} cannot be verified")
    return Example(example.prompt, example.answer, record=record)


def _answers(example: Example) -> Iterator[str]:
    yield from [example.answer] if isinstance(example.answer, str) else example.answer


def _choice(record: dict[str, Any], where: str) -> Example:
    question, options, answer = (record.get(field) for field in ("question", "options", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: no question")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"{where}: options must be a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: options must be texts")
    options = [option for option in options if option != PADDING]
    letters = LETTERS[: len(options)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise DataError(f"{where}: answer must be a letter from A to {letters[-1]}, got {answer!r}")
    if (place := record.get("answer_index")) is not None and place != letters.index(answer):
        raise DataError(f"{where}: answer {answer} is option {letters.index(answer)}, its answer_index is {place!r}")
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return Example(
        "\n".join([question, "", *lines, "", "Answer with the letter of the right option."]), answer, record=record
    )
