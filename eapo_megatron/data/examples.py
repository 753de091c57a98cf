"""Prompts with reference answers from JSON, JSON Lines and Parquet files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and, where there is one, the line or record."""


@dataclass(frozen=True)
class Example:
    """A prompt, the reference answer or answers (any is accepted), and a written-out solution where there is one."""

    prompt: str
    answer: str | list[str]
    solution: str | None = None


@dataclass(frozen=True)
class LoadedExamples:
    """Examples in the order of the file, and how many records were dropped for which reason."""

    examples: list[Example]
    dropped: dict[str, int]


class Layout(TypedDict):
    prompt_field: str
    answer_field: str
    solution_field: str | None
    answer_format: Literal["plain", "gsm8k"]


# Use as load_examples(path, **LAYOUTS["gsm8k"]).
LAYOUTS: dict[str, Layout] = {
    "gsm8k": {"prompt_field": "question", "answer_field": "answer", "solution_field": None, "answer_format": "gsm8k"},
    "math": {"prompt_field": "problem", "answer_field": "answer", "solution_field": None, "answer_format": "plain"},
}


def load_examples(
    path: str | Path,
    *,
    prompt_field: str = "problem",
    answer_field: str = "answer",
    solution_field: str | None = None,
    answer_format: Literal["plain", "gsm8k"] = "plain",
) -> LoadedExamples:
    """The examples of a .json (a list of objects), .jsonl or .parquet file.

    answer_format "plain": the answer is text, a number or a list of these. "gsm8k": the answer field holds the
    solution and, after "####", the answer; calculator annotations such as <<48/2=24>> are taken out of it. Records
    without an answer or with a blank prompt are dropped and counted.

    Raises DataError for a missing file, an unknown file type, a malformed line, a missing or mistyped field, and when
    no example is left; ValueError for a `solution_field` beside answer_format "gsm8k", which has its own.
    """
    if answer_format not in ("plain", "gsm8k"):
        raise ValueError(f'answer_format must be "plain" or "gsm8k", got {answer_format!r}')
    if answer_format == "gsm8k" and solution_field is not None:
        raise ValueError('solution_field must be None with answer_format "gsm8k": the answer field holds the solution')
    path = Path(path)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for where, record in _records(path):
        prompt = _field(record, prompt_field, where)
        if not isinstance(prompt, str):
            raise DataError(f"{where}: field {prompt_field!r} must be text, got {type(prompt).__name__}")
        raw_answer = _field(record, answer_field, where)
        answer: str | list[str]
        if answer_format == "gsm8k":
            answer, solution = _gsm8k_answer(raw_answer, where)
        else:
            answer = _plain_answer(raw_answer, where)
            solution = None if solution_field is None else _field(record, solution_field, where)
        if not isinstance(solution, str | None):
            raise DataError(f"{where}: field {solution_field!r} must be text or null, got {type(solution).__name__}")
        if not prompt.strip():
            dropped["blank prompt"] += 1
        elif not answer:
            dropped["no answer"] += 1
        else:
            examples.append(Example(prompt, answer, solution))
    if not examples:
        raise DataError(f"{path}: no usable example ({dict(dropped) or 'the file is empty'})")
    return LoadedExamples(examples, dict(dropped))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place in the file, as an error message names it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _object(_parse_json(line, where), where)
    elif path.suffix == ".json":
        records = _parse_json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(records, list):
            raise DataError(f"{path}: must hold a list of objects, got {type(records).__name__}")
        for number, record in enumerate(records, start=1):
            where = f"{path}, record {number}"
            yield where, _object(record, where)
    elif path.suffix == ".parquet":
        yield from _parquet_records(path)
    else:
        raise DataError(f"{path}: file type must be .json, .jsonl or .parquet")


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}, record {number}", record


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON ({error})") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object, got {type(record).__name__}")
    return record


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise DataError(f"{where}: no field {name!r}, the fields are {sorted(record)}")
    return record[name]


def _plain_answer(answer: Any, where: str) -> str | list[str]:
    """The answer as text, or a list of texts; blank elements are left out, "" and [] stand for no answer."""
    if isinstance(answer, list):
        return [text for element in answer if (text := _answer_text(element, where))]
    return _answer_text(answer, where)


def _answer_text(answer: Any, where: str) -> str:
    if answer is None:
        return ""
    if isinstance(answer, str):
        return answer.strip()
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise DataError(f"{where}: an answer must be text, a number or a list of these, got {type(answer).__name__}")
    if not math.isfinite(answer):  # NaN and Infinity, which Python's JSON reads
        return ""
    return str(answer).removesuffix(".0")  # the benchmarks store whole answers as 142.0


def _gsm8k_answer(text: Any, where: str) -> tuple[str, str | None]:
    if text is None:
        return "", None
    if not isinstance(text, str) or "####" not in text:
        raise DataError(f'{where}: a GSM8K answer must be text with its result after "####"')
    return text.rpartition("####")[2].strip().replace(",", ""), _CALCULATOR_ANNOTATION.sub("", text)
