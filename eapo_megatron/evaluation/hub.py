"""The benchmarks as the Hugging Face hub publishes them: which data set, which of its splits, which fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from eapo_megatron.config import RecipeError
from eapo_megatron.data.record_files import read_records

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub; `fields`: what the reader's fields are called there, where it is not the same."""

    repository: str
    split: str
    fields: tuple[tuple[str, str], ...] = ()


_QUESTION = (("problem", "question"),)
DATA_SETS = {
    "aime24": DataSet("HuggingFaceH4/aime_2024", "train"),
    "aime25": DataSet("math-ai/aime25", "test"),
    "amc": DataSet("AI-MO/aimo-validation-amc", "train"),
    "math500": DataSet("HuggingFaceH4/MATH-500", "test"),
    "minerva": DataSet("math-ai/minervamath", "test", _QUESTION),
    "olympiad": DataSet("knoveleng/OlympiadBench", "train", _QUESTION),
    "mmlu_pro": DataSet("TIGER-Lab/MMLU-Pro", "test"),
}


def hub_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a benchmark's split with its place, in the order of its files; downloaded or from the hub's cache.

    Raises:
        RecipeError: naming the data set, when it is neither cached nor to be had, or has no file of the split; naming
            the file that cannot be read.
    """
    data_set = DATA_SETS[name]
    named = f"data set {data_set.repository} of the Hugging Face hub"
    patterns = [f"{folder}{data_set.split}*{suffix}" for folder in ("", "*/") for suffix in SUFFIXES]
    try:
        folder = Path(snapshot_download(data_set.repository, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:  # what the hub's client raises, without a network too
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{name}: {named} cannot be downloaded and is not cached ({reason}); give --data") from error
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not files:
        raise RecipeError(f"{name}: {named} has no {data_set.split}* file of {', '.join(SUFFIXES)}")
    for path in files:
        for where, record in read_records(path):
            yield where, record | {ours: record.get(theirs) for ours, theirs in data_set.fields}
