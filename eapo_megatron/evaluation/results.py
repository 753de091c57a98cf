"""The result of an evaluation from its responses: results.json and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eapo_megatron.config import RecipeError
from eapo_megatron.evaluation.examination import Examination
from eapo_megatron.evaluation.pass_at_k import intervals, pass_at_k
from eapo_megatron.evaluation.response_file import ResponseFile
from eapo_megatron.evaluation.tasks import Task


def results(examination: Examination, file: ResponseFile) -> dict[str, Any]:
    """{"benchmarks": {name: ...}}: Avg@n, Pass@k and 95 % intervals, lengths in tokens, counts of responses.

    A response counts as correct when its reward is above `reward.positive_threshold`; one without a verdict does not.

    Raises:
        RecipeError: naming the file and the benchmark, when it lacks responses.
    """
    samples = {task.benchmark.name: task.n for task in examination.tasks}
    held: dict[str, list[dict[str, Any]]] = {name: [] for name in samples}
    for record in file.records():
        if record["sample"] < samples.get(record["benchmark"], 0):
            held[record["benchmark"]].append({key: value for key, value in record.items() if key != "text"})
    threshold = examination.recipe.reward.positive_threshold
    return {
        "seed": examination.recipe.seed,
        "benchmarks": {
            task.benchmark.name: _of_task(task, held[task.benchmark.name], file, threshold, examination.recipe.seed)
            for task in examination.tasks
        },
    }


def _of_task(
    task: Task, records: list[dict[str, Any]], file: ResponseFile, threshold: float, seed: int
) -> dict[str, Any]:
    problems, wanted = len(task.prompts), len(task.prompts) * task.n
    if len({(record["problem"], record["sample"]) for record in records}) != wanted or len(records) != wanted:
        raise RecipeError(
            f"{file.path} has {len(records)} of the {wanted} responses to {task.benchmark.name} "
            f"({problems} problems, {task.n} each)"
        )
    correct = dict.fromkeys(task.prompts, 0)
    for record in records:
        correct[record["problem"]] += record["reward"] is not None and record["reward"] > threshold
    values = pass_at_k(list(correct.values()), task.n)
    means, (low, high) = values.mean(0).tolist(), intervals(values, seed=seed).tolist()
    ks = range(1, task.n + 1)
    return {
        "n": task.n,
        "problems": problems,
        "left_out": task.left_out,
        "avg_at_k": {str(task.n): means[0]},
        "pass_at_k": {str(k): mean for k, mean in zip(ks, means, strict=True)},
        "intervals": {
            "avg_at_k": {str(task.n): [low[0], high[0]]},
            "pass_at_k": {str(k): list(ends) for k, *ends in zip(ks, low, high, strict=True)},
        },
        "mean_length": float(torch.tensor([record["tokens"] for record in records], dtype=torch.float64).mean()),
        "truncated": sum(not record["finished"] for record in records),
        "no_verdict": sum(record["reward"] is None for record in records),
    }


def print_results(found: dict[str, Any], console: Console, ks: Sequence[int] = ()) -> None:
    """A benchmark's percentages over their intervals, and a line on its responses; Pass@k for each of `ks`, or for n.

    The table fits 80 columns, a log's, with up to three of `ks`.
    """
    percentages = ["Avg@n %", *([f"Pass@{k} %" for k in ks] or ["Pass@n %"])]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("benchmark", "responses", *percentages):
        table.add_column(column, no_wrap=True)
    for name, of in found["benchmarks"].items():
        n = str(of["n"])
        table.add_row(
            name,
            f"{of['problems']} x {n}",
            _percent(of["avg_at_k"][n], of["intervals"]["avg_at_k"][n]),
            *(_percent(of["pass_at_k"][k], of["intervals"]["pass_at_k"][k]) for k in [*map(str, ks)] or [n]),
        )
    console.print(table)
    for name, of in found["benchmarks"].items():
        console.print(
            f"{name}: mean length {of['mean_length']:.1f} tokens; {of['truncated']} truncated, "
            f"{of['no_verdict']} without verdict, {len(of['left_out'])} left out",
            soft_wrap=True,
        )


def _percent(value: float, ends: list[float]) -> str:
    return f"{100 * value:.1f}\n{100 * ends[0]:.1f}-{100 * ends[1]:.1f}"
