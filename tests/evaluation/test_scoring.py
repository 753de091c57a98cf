"""Responses scored again: each by its benchmark's own judge, in one pass over the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eapo_megatron.data import Prompt
from eapo_megatron.evaluation.benchmarks import BENCHMARKS
from eapo_megatron.evaluation.response_file import ResponseFile
from eapo_megatron.evaluation.scoring import rescore
from eapo_megatron.evaluation.tasks import Task
from eapo_megatron.recipe_files import parse_recipe


class Counted(ResponseFile):
    """A file that counts its passes."""

    passes = 0

    def replace(self, records: Iterator[Mapping[str, Any]]) -> None:
        self.passes += 1
        super().replace(records)


def response(benchmark: str, problem: int, text: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "problem": problem,
        "sample": 0,
        "text": text,
        "tokens": 3,
        "finished": True,
        "reward": None,
    }


@pytest.mark.slow
def test_each_benchmark_has_its_judge_and_the_file_one_pass(tmp_path: Path) -> None:
    settings = {"name": "r", "model": {"path": "m"}, "data": {"task": "arithmetic"}, "reward": {"num_workers": 1}}
    answers = {"amc": ["7", "8"], "mmlu_pro": ["C"], "aime24": ["12"]}
    tasks = [
        Task(BENCHMARKS[name], {i: Prompt(i, "?", [3], answer, None) for i, answer in enumerate(given)}, 1, [])
        for name, given in answers.items()
    ]
    examination = SimpleNamespace(recipe=parse_recipe(settings, source="r.yaml"), tasks=tasks)
    file = Counted(tmp_path)
    before = [
        response("amc", 0, r"\boxed{7}"),
        response("mmlu_pro", 0, r"\boxed{(C)}"),
        response("math500", 0, r"\boxed{1}"),
        response("amc", 1, r"\boxed{7}"),
        response("aime24", 0, r"\boxed{12}"),
        response("mmlu_pro", 0, r"\boxed{7}"),
    ]
    file.append(before)
    rescore(examination, file)  # type: ignore[arg-type]
    assert file.passes == 1
    expected = [1.0, 1.0, None, -1.0, 1.0, -1.0]  # the third is of a benchmark that was not asked for
    assert list(file.records()) == [record | {"reward": x} for record, x in zip(before, expected, strict=True)]
