"""Prompts with reference answers from the records of JSON, JSON Lines and Parquet files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from eapo_megatron.data.record_files import DataError, read_records
from eapo_megatron.reading import is_text

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One message of a chat."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt, the reference answer or answers (any is accepted), and a written-out solution where there is one.

    The prompt is the user's one message, or a chat that ends in a message of the user.
    """

    prompt: str | list[Message]
    answer: str | list[str]
    solution: str | None = None
    record: dict[str, Any] | None = None  # the record it was read from, where that is kept


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


def _plain(prompt_field: str, answer_field: str) -> Layout:
    return {
        "prompt_field": prompt_field,
        "answer_field": answer_field,
        "solution_field": None,
        "answer_format": "plain",
    }


# Use as load_examples(path, **LAYOUTS["gsm8k"]).
LAYOUTS: dict[str, Layout] = {
    "math": _plain("problem", "answer"),
    "gsm8k": {**_plain("question", "answer"), "answer_format": "gsm8k"},
    "verl": _plain("prompt", "reward_model.ground_truth"),
    "nemo_rl": _plain("messages", "messages.-1.content"),
}


def load_examples(
    path: str | Path,
    *,
    prompt_field: str = "problem",
    answer_field: str = "answer",
    solution_field: str | None = None,
    answer_format: Literal["plain", "gsm8k"] = "plain",
    keep_records: bool = False,
) -> LoadedExamples:
    """The examples of a .json (a list of objects), .jsonl or .parquet file.

    A field is named by its key, or by a path of keys and list positions: "reward_model.ground_truth",
    "messages.-1.content". The prompt is text or a list of chat messages, objects with role and content, whose last is
    the user's; a message that `answer_field` points into is no part of the prompt.

    answer_format "plain": the answer is text, a number, a list of these, or an object with these under ground_truth.
    "gsm8k": the answer field holds the solution and, after "####", the answer; calculator annotations such as
    <<48/2=24>> are taken out of it. Records without an answer or with a blank prompt are dropped and counted.
    keep_records: whether examples hold the records that they were read from.

    Raises:
        RecipeError: naming the file, and the line or record where there is one; its kind DataError for a missing or
            mistyped field, for text that UTF-8 cannot hold, and when no example is left.
        ValueError: for a `solution_field` beside answer_format "gsm8k", which has its own.
    """
    if answer_format not in ("plain", "gsm8k"):
        raise ValueError(f'answer_format must be "plain" or "gsm8k", got {answer_format!r}')
    if answer_format == "gsm8k" and solution_field is not None:
        raise ValueError('solution_field must be None with answer_format "gsm8k": the answer field holds the solution')
    path = Path(path)
    return examples_of(
        read_records(path),
        source=str(path),
        prompt_field=prompt_field,
        answer_field=answer_field,
        solution_field=solution_field,
        answer_format=answer_format,
        keep_records=keep_records,
    )


def examples_of(
    records: Iterable[tuple[str, Any]],
    *,
    source: str,
    prompt_field: str,
    answer_field: str,
    solution_field: str | None = None,
    answer_format: Literal["plain", "gsm8k"] = "plain",
    keep_records: bool = False,
) -> LoadedExamples:
    """`load_examples` for records that are not in a file: each comes with its place, as errors name it.

    Raises:
        DataError: as of `load_examples`, and for a record that is no object.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: must be an object, got {type(record).__name__}")
        held = _field(record, prompt_field, where)
        if isinstance(held, list) and answer_field.startswith(f"{prompt_field}.-1."):
            held = held[:-1]
        prompt = _prompt(held, prompt_field, where)
        raw_answer = _field(record, answer_field, where)
        answer: str | list[str]
        if answer_format == "gsm8k":
            answer, solution = _gsm8k_answer(raw_answer, where)
        else:
            answer = _plain_answer(raw_answer, where)
            solution = None if solution_field is None else _field(record, solution_field, where)
        if not isinstance(solution, str | None):
            raise DataError(f"{where}: field {solution_field!r} must be text or null, got {type(solution).__name__}")
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if not question.strip():
            dropped["blank prompt"] += 1
        elif not answer:
            dropped["no answer"] += 1
        else:
            examples.append(Example(prompt, answer, solution, record if keep_records else None))
    if not examples:
        raise DataError(f"{source}: no usable example ({dict(dropped) or 'the file is empty'})")
    return LoadedExamples(examples, dict(dropped))


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    """What a record holds under a key, or at the end of a path; a path through null ends in null."""
    held: Any = record
    parts = [name] if name in record else name.split(".")
    for number, part in enumerate(parts):
        if held is None:
            return None
        if isinstance(held, list) and re.fullmatch(r"-?\d+", part) and -len(held) <= int(part) < len(held):
            held = held[int(part)]
        elif isinstance(held, dict) and part in held:
            held = held[part]
        else:
            inside = f" of {'.'.join(parts[:number])!r}" if number else ""
            there = sorted(held) if isinstance(held, dict) else f"those of a {type(held).__name__}"
            raise DataError(f"{where}: no field {name!r}, the fields{inside} are {there}")
    if wrong := next((text for text in _texts(held) if not is_text(text)), None):
        raise DataError(f"{where}: field {name!r} holds a lone surrogate, which is no text: {ascii(wrong)[:60]}")
    return held


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _prompt(held: Any, name: str, where: str) -> str | list[Message]:
    """The user's one message, or the chat where there is more."""
    if isinstance(held, str):
        return held
    if not isinstance(held, list):
        raise DataError(f"{where}: field {name!r} must be text or a list of messages, got {type(held).__name__}")
    messages = [_message(message, f"{where}: message {number} of {name!r}") for number, message in enumerate(held, 1)]
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: the messages of {name!r} must end with the user's")
    return messages[0]["content"] if len(messages) == 1 else messages


def _message(held: Any, where: str) -> Message:
    if not isinstance(held, dict):
        raise DataError(f"{where} must be an object, got {type(held).__name__}")
    role, content = held.get("role"), held.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, got {type(content).__name__}")
    return {"role": role, "content": content}


def _plain_answer(answer: Any, where: str) -> str | list[str]:
    """The answer as text, or a list of texts; blank elements are left out, "" and [] stand for no answer."""
    if isinstance(answer, dict) and "ground_truth" in answer:
        answer = answer["ground_truth"]
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
