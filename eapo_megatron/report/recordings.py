"""What runs left behind, as the report reads it: metrics, recipe, evaluations and token records.

A run that is damaged or still running is read as far as it goes; `notes` says in one line each what was left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.config import RecipeError
from eapo_megatron.records.records import METRICS_FILE
from eapo_megatron.records.tokens import SCHEMA, VERSION, recorded_steps
from eapo_megatron.run_lock import DEAD_AFTER_SECONDS, LOCK_FILE, check_unlocked
from eapo_megatron.saved_recipe import RECIPE_FILE

EVALUATION_FOLDER = "evaluation"
_USUAL_LOSS = "clipped_surrogate"
MOST_TOKENS = 1_500_000  # of a run that are read: what a page of one file can hold
_FREE_KEYS = ("name", "seed", "logging", "cluster", "parallel", "checkpoint", "evaluation")  # may differ between seeds


@dataclass(frozen=True)
class Tokens:
    """R recorded responses in order of step, group and response, M tokens in all, one response behind the other."""

    steps: np.ndarray  # int32 [R]
    groups: np.ndarray  # int32 [R], in the batch of the step
    responses: np.ndarray  # int32 [R], in the group
    prompts: list[str]  # R
    answers: list[str]  # R
    rewards: np.ndarray  # float32 [R]
    finished: np.ndarray  # bool [R]
    advantages: np.ndarray  # float32 [R], before the shaping
    offsets: np.ndarray  # int64 [R + 1]: where each response's tokens begin
    texts: list[str]  # the different texts of tokens
    text_of: np.ndarray  # int32 [M], into `texts`
    entropies: np.ndarray  # float32 [M], nats
    old_log_probs: np.ndarray  # float32 [M]
    rollout_log_probs: np.ndarray  # float32 [M]
    shaped_advantages: np.ndarray  # float32 [M]
    quadrants: np.ndarray  # uint8 [M], into QUADRANTS

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def row_of(self) -> np.ndarray:
        """int64 [M]: the response of each token."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def correct(self) -> np.ndarray:
        """bool [R]: on which side training saw the response; one without tokens by the sign of its reward."""
        correct = self.rewards > 0
        some = np.diff(self.offsets) > 0
        correct[some] = self.quadrants[self.offsets[:-1][some]] < QUADRANTS.index("nhr")
        return correct

    @property
    def group_of(self) -> np.ndarray:
        """int64 [R]: the number of each response's group among all recorded ones, ascending."""
        keys = np.stack((self.steps, self.groups))
        return np.cumsum(np.append(False, (keys[:, 1:] != keys[:, :-1]).any(axis=0))) if len(self) else np.zeros(0, int)

    def group_entropies(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and population std (nats) of the token entropies of each response's group: float64 [R]."""
        group_of = self.group_of
        of_tokens, values = group_of[self.row_of], self.entropies.astype(np.float64)
        counts = np.maximum(np.bincount(of_tokens), 1)
        means = np.bincount(of_tokens, values) / counts
        variances = np.bincount(of_tokens, (values - means[of_tokens]) ** 2) / counts
        return means[group_of], np.sqrt(variances)[group_of]


@dataclass(frozen=True)
class RecordedRun:
    """One run folder."""

    folder: Path
    recipe: dict[str, Any]  # {} where recipe.json is missing
    metrics: list[dict[str, Any]]  # in order of step
    evaluations: dict[str, dict[int, float]]  # Pass@k by benchmark and k
    tokens: Tokens | None
    is_running: bool
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def alpha(self) -> float | None:
        """Of EAPO; None for other methods."""
        shaping = self.recipe.get("algorithm", {}).get("shaping", {})
        return float(shaping.get("alpha", 0.2)) if shaping.get("name") == "eapo" else None

    @property
    def method(self) -> str:
        """The recipe's method, or the loss, shaping or estimator that is not the usual one, by name."""
        algorithm = self.recipe.get("algorithm")
        if not algorithm:
            return self.name
        shaping = algorithm.get("shaping", {})
        loss, shaped = algorithm.get("loss", {}).get("name", _USUAL_LOSS), shaping.get("name", "eapo")
        name = self.recipe.get("method")
        if of_user := [choice for choice in (loss, shaped) if ":" in choice]:
            name = "+".join(of_user)
        elif name is None and loss != _USUAL_LOSS:
            name = loss
        elif name is None and shaped == "none":
            name = algorithm.get("advantage_estimator", "grpo")
        elif name is None:
            name = "+".join(shaping["only"]) if shaped == "quadrant" and "only" in shaping else shaped
        return name if self.alpha is None else f"{name}, \u03b1 = {self.alpha:g}"

    @property
    def experiment(self) -> str:
        """What the seeds of one experiment share."""
        shared = {key: value for key, value in self.recipe.items() if key not in _FREE_KEYS}
        return json.dumps(shared, sort_keys=True) if shared else str(self.folder)

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values (float64) of one metric, where it was logged."""
        points = [(line["step"], line[metric]) for line in self.metrics if line.get(metric) is not None]
        return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points], dtype=float)


def read_run(folder: Path) -> RecordedRun:
    """Reads a run folder as far as it can be read.

    Raises:
        RecipeError: it is no folder, or holds neither metrics nor token records that can be read.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not the folder of a run")
    notes: list[str] = []
    metrics = _read_metrics(folder / METRICS_FILE, notes)
    tokens = _read_tokens(folder, notes)
    if not metrics and tokens is None:
        raise RecipeError(f"{folder} has no records: neither {METRICS_FILE} nor tokens/{_because(notes)}")
    is_running = _is_running(folder)
    if is_running:
        step = metrics[-1]["step"] if metrics else 0
        notes.append(f"{folder} is still running: its records up to step {step}")
    recipe = _read_recipe(folder / RECIPE_FILE, notes)
    return RecordedRun(folder, recipe, metrics, read_evaluations(folder, notes), tokens, is_running, notes)


def _because(notes: Sequence[str]) -> str:
    return f" that can be read ({'; '.join(notes)})" if notes else ""


def _is_running(folder: Path) -> bool:
    try:
        check_unlocked(folder)
    except RecipeError:
        return True
    except OSError:  # the folder is someone else's, and judging a heartbeat by its clock takes a file there
        return time.time() - (folder / LOCK_FILE).stat().st_mtime < DEAD_AFTER_SECONDS
    return False


def _read_recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path} is missing: the run goes by its folder's name")
        return {}
    except ValueError:
        notes.append(f"{path} is damaged: the run goes by its folder's name")
        return {}
    return saved.get("recipe", saved)


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines, damaged = {}, []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            lines[int(record["step"])] = record
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if damaged:
        notes.append(f"{path}: line {', '.join(map(str, damaged[:5]))} is damaged and left out")
    return [lines[step] for step in sorted(lines)]


def read_evaluations(folder: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    """Pass@k by benchmark and k, of the results.json files below the run's evaluation folder, the newest last."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / EVALUATION_FOLDER).glob("**/results.json"), key=lambda path: path.stat().st_mtime):
        try:
            benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
            for name, result in benchmarks.items():
                found[name] = {int(k): float(value) for k, value in result["pass_at_k"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{path} holds no Pass@k that can be read: left out")
    return found


def _read_tokens(folder: Path, notes: list[str]) -> Tokens | None:
    files = [file for path in recorded_steps(folder).values() if (file := _open(path, notes)) is not None]
    total = sum(_token_count(file) for _, file in files)
    every = max(1, -(-total // MOST_TOKENS))
    if every > 1:
        notes.append(f"{folder}: {total:,} tokens are recorded; of these the report reads 1 recorded step in {every}")
    parts = [part for path, file in files[::-every][::-1] for part in _whole_groups(path, file, notes)]
    return _tokens(pa.concat_tables(parts)) if parts else None


def _open(path: Path, notes: list[str]) -> tuple[Path, pq.ParquetFile] | None:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        notes.append(f"{path} is damaged and left out: {_first_line(error)}")
        return None
    metadata = file.schema_arrow.metadata or {}
    version = int(metadata.get(b"eapo_megatron.tokens", b"0"))
    if version != VERSION:
        notes.append(f"{path} is of version {version} of the token records, this reads {VERSION}: left out")
        return None
    return path, file


def _token_count(file: pq.ParquetFile) -> int:
    column = SCHEMA.names.index("token_ids")
    return sum(file.metadata.row_group(number).column(column).num_values for number in range(file.num_row_groups))


def _whole_groups(path: Path, file: pq.ParquetFile, notes: list[str]) -> list[pa.Table]:
    """The row groups of a file that can be read."""
    parts = []
    for number in range(file.num_row_groups):
        try:
            parts.append(file.read_row_group(number).cast(SCHEMA))
        except (pa.ArrowException, OSError, ValueError) as error:
            notes.append(f"{path}: row group {number} is damaged and left out: {_first_line(error)}")
    return parts


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).partition("\n")[0].split())


def _tokens(table: pa.Table) -> Tokens:
    def numbers(name: str) -> np.ndarray:
        return table[name].to_numpy()

    def of_tokens(name: str) -> np.ndarray:
        return table[name].combine_chunks().flatten().to_numpy()

    lengths = [len(ids) for ids in table["token_ids"]]
    texts = table["texts"].combine_chunks().flatten().dictionary_encode()
    names = table["quadrants"].combine_chunks().flatten().dictionary_encode()
    numbering = np.array([QUADRANTS.index(name) for name in names.dictionary.to_pylist()], dtype=np.uint8)
    return Tokens(
        steps=numbers("step"),
        groups=numbers("group"),
        responses=numbers("response"),
        prompts=table["prompt"].to_pylist(),
        answers=table["answer"].to_pylist(),
        rewards=numbers("reward"),
        finished=numbers("finished"),
        advantages=numbers("advantage"),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        texts=texts.dictionary.to_pylist(),
        text_of=texts.indices.to_numpy(),
        entropies=of_tokens("entropies"),
        old_log_probs=of_tokens("old_log_probs"),
        rollout_log_probs=of_tokens("rollout_log_probs"),
        shaped_advantages=of_tokens("shaped_advantages"),
        quadrants=numbering[names.indices.to_numpy()],
    )
