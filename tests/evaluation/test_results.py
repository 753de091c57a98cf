"""The table that an evaluation prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from eapo_megatron.evaluation.benchmarks import BENCHMARKS
from eapo_megatron.evaluation.results import print_results

OF_ONE = {
    "n": 32,
    "problems": 1319,
    "left_out": ["a line"],
    "avg_at_k": {"32": 1.0},
    "pass_at_k": {str(k): 1.0 for k in range(1, 33)},
    "intervals": {"avg_at_k": {"32": [0.9996, 1.0]}, "pass_at_k": {str(k): [0.9996, 1.0] for k in range(1, 33)}},
    "mean_length": 12345.6,
    "truncated": 999,
    "no_verdict": 999,
}


@pytest.mark.parametrize("ks", [[], [1, 16, 32]])
def test_a_log_of_80_columns_holds_every_name_and_number(ks: list[int]) -> None:
    sink = io.StringIO()
    print_results({"benchmarks": dict.fromkeys(BENCHMARKS, OF_ONE)}, Console(file=sink, width=80), ks)
    lines = sink.getvalue().splitlines()
    rows, notes = lines[: -len(BENCHMARKS)], lines[-len(BENCHMARKS) :]
    assert max(map(len, rows)) <= 80
    percentages = 1 + max(1, len(ks))
    for name in BENCHMARKS:
        assert [name, "1319", "x", "32", *["100.0"] * percentages] in [row.split() for row in rows]
    assert sum(row.split().count("100.0-100.0") for row in rows) == len(BENCHMARKS) * percentages
    said = "mean length 12345.6 tokens; 999 truncated, 999 without verdict, 1 left out"
    assert notes == [f"{name}: {said}" for name in BENCHMARKS]
