"""Benchmarks from the Hugging Face hub: snapshots laid out as their data sets are, and a hub that is out of reach."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.evaluation import hub
from eapo_megatron.evaluation.benchmarks import BENCHMARKS, load_benchmark
from eapo_megatron.evaluation.hub import DATA_SETS

# A file of each data set with a record or two, all their documented fields.
SNAPSHOTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "aime24": (
        "data/train-00000-of-00001.parquet",
        [{"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}],
    ),
    "aime25": ("test.jsonl", [{"problem": "p", "answer": "70", "id": "0"}]),
    "amc": ("data/train-00000-of-00001.parquet", [{"id": 0, "problem": "p", "answer": 142.0, "url": "u"}]),
    "math500": (
        "test.jsonl",
        [
            {
                "problem": "p",
                "solution": "s",
                "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            }
        ],
    ),
    "minerva": ("test.jsonl", [{"question": "p", "answer": "9.6"}]),
    "olympiad": ("data/train-00000-of-00001.parquet", [{"id": 1606, "question": "p", "answer": "2"}]),
    "mmlu_pro": (
        "data/test-00000-of-00001.parquet",
        [
            {
                "question_id": 70,
                "question": "p",
                "options": ["a", "b", "c"],
                "answer": "C",
                "answer_index": 2,
                "cot_content": "",
                "category": "business",
                "src": "ori_mmlu-business_ethics",
            }
        ],
    ),
}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every data set's snapshot is in, in the place of the hub's client."""

    def download(repository: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(hub, "snapshot_download", download)
    return tmp_path


@pytest.mark.parametrize("name", DATA_SETS)
def test_each_benchmark_is_read_as_it_is_published(name: str, snapshot: Path) -> None:
    file, records = SNAPSHOTS[name]
    write(snapshot / file, records)
    write(snapshot / "data" / "validation-00000-of-00001.parquet", [{"question": "of another split"}])
    problems = load_benchmark(BENCHMARKS[name], None, key="--data")
    (example,) = problems.examples.values()
    assert problems.left_out == []
    assert str(example.prompt).startswith("p")
    assert example.answer == str(records[0]["answer"]).removesuffix(".0")


def test_files_of_a_split_are_read_in_order_and_numbered_through(snapshot: Path) -> None:
    for part in (1, 0):
        write(
            snapshot / "data" / f"train-0000{part}-of-00002.parquet",
            [{"problem": f"{part}/{i}", "answer": str(i)} for i in range(2)],
        )
    problems = load_benchmark(BENCHMARKS["aime24"], None, key="--data")
    assert {index: example.prompt for index, example in problems.examples.items()} == {
        0: "0/0",
        1: "0/1",
        2: "1/0",
        3: "1/1",
    }


def test_a_data_set_without_the_split_is_named(snapshot: Path) -> None:
    with pytest.raises(RecipeError, match=r"aime25: data set math-ai/aime25 of .* has no test\* file of"):
        load_benchmark(BENCHMARKS["aime25"], None, key="--data")


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, with an empty cache and no connection to be had."""

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        load_benchmark(BENCHMARKS["math500"], None, key="--data")
    said = str(caught.value)
    assert said.startswith("math500: data set HuggingFaceH4/MATH-500 of the Hugging Face hub cannot be downloaded")
    assert said.endswith("give --data")
    assert "\n" not in said
