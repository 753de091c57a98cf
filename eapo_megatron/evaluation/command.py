"""`eapo-megatron evaluate`: what its launching process does around the ranks, which `answers` has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import write_json
from eapo_megatron.evaluation.benchmarks import load_benchmark, named
from eapo_megatron.evaluation.examination import Examination, examine
from eapo_megatron.evaluation.response_file import ResponseFile
from eapo_megatron.evaluation.results import print_results, results
from eapo_megatron.evaluation.scoring import rescore
from eapo_megatron.evaluation.subject import find_subject
from eapo_megatron.run_lock import RunLock

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Evaluation:
    """One call of the command, read and checked."""

    examination: Examination
    file: ResponseFile
    ks: list[int]  # of the table's columns; empty: each benchmark's n

    def say_left_out(self) -> None:
        """One line on each record of the benchmarks that cannot be used."""
        for task in self.examination.tasks:
            for line in task.left_out:
                print(f"left out: {line}", file=sys.stderr)


def prepare_evaluation(
    subject: Path,
    overrides: Sequence[str],
    benchmarks: str,
    *,
    data: Path | None,
    n: int | None,
    ks: str | None,
    out: Path | None,
    reads_benchmarks: bool = True,
) -> Evaluation:
    """Reads and checks all that is named; nothing is written. Ranks but the first leave the benchmarks to that one.

    Raises:
        RecipeError: one sentence naming the option, the key or the file.
    """
    chosen = named(benchmarks.split(","), key="--benchmarks")
    columns = [] if ks is None else _numbers(ks)
    for benchmark in chosen:
        for k in columns:
            if k > (n or benchmark.n):
                raise RecipeError(f"--k {k}: {benchmark.name} gets {n or benchmark.n} responses a problem (--n)")
    found = find_subject(subject, overrides)
    loaded = [load_benchmark(benchmark, data, key="--data") for benchmark in chosen if reads_benchmarks]
    examination = examine(found.recipe, loaded, n, source=str(subject))
    return Evaluation(examination, ResponseFile(found.out if out is None else out), columns)


def rescore_all(evaluation: Evaluation) -> None:
    """Verifies the responses that are there again."""
    with RunLock(evaluation.file.folder):
        evaluation.file.open(evaluation.examination.origin())
        rescore(evaluation.examination, evaluation.file)


def report_evaluation(evaluation: Evaluation) -> None:
    """Writes results.json and prints the table, then where it is."""
    found, path = results(evaluation.examination, evaluation.file), evaluation.file.folder / RESULTS_FILE
    write_json(path, found)
    print_results(found, Console(), evaluation.ks)
    print(path)


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
        raise RecipeError(f"--k must be numbers from 1 on, with commas, got {text!r}")
    return sorted(map(int, set(numbers)))
