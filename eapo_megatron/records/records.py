"""What a run leaves behind: metrics.jsonl, samples.jsonl, tokens, TensorBoard (W&B, MLflow), progress, summary.json.

Only rank 0 writes. A resumed run first drops what is after its checkpoint, so the files hold each step once.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eapo_megatron.config import Recipe
from eapo_megatron.durable import write_bytes, write_json
from eapo_megatron.records.tokens import TokenRecords
from eapo_megatron.records.trackers import Trackers

METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE = "metrics.jsonl", "samples.jsonl", "summary.json"
_SECONDS_BETWEEN_LINES = 5.0


class Records:
    """The records of one run from `first_step` on; a context manager."""

    def __init__(self, recipe: Recipe, *, first_step: int) -> None:
        self.folder = recipe.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier, lost = _drop_lines_from(self.folder / METRICS_FILE, first_step, every_step=True)
        _, lost_samples = _drop_lines_from(self.folder / SAMPLES_FILE, first_step)
        self._lost = [*lost, *lost_samples]
        self._metrics = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        # A lone surrogate that a tokenizer made becomes its escape, which JSON reads as what it was.
        self._samples = (self.folder / SAMPLES_FILE).open("a", encoding="utf-8", errors="backslashreplace")
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, Any] = {}
        self._line_at = 0.0  # when a log file last had a line of progress
        self._trackers = Trackers(recipe, first_step, earlier, self.say)
        max_bytes = recipe.logging.record_tokens_max_mib * 2**20
        self.tokens = TokenRecords(self.folder, first_step=first_step, max_bytes=max_bytes, say=self.say)

    def __enter__(self) -> Records:
        self._progress.start()
        for line in self._lost:
            self.say(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._samples.close()
        self._trackers.close()

    def advance(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Moves the progress bar of a phase; where there is no terminal, says a line every few seconds."""
        if self._progress.disable:
            if done == total or perf_counter() - self._line_at >= _SECONDS_BETWEEN_LINES:
                self._line_at = perf_counter()
                self.say(f"{phase} {done}/{total} {note}")
            return
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task(phase, total=total, note="")
        self._progress.update(self._bars[phase], completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """One line above the progress bar."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics to every record."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._metrics.flush()
        self._trackers.log(metrics, step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A few sampled responses with their rewards."""
        for sample in samples:
            self._samples.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
        self._samples.flush()

    def sync(self) -> None:
        """Brings the lines so far to disk, before a checkpoint that counts on them."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def settle(self) -> None:
        """After a checkpoint: no resume takes the steps so far back."""
        self._trackers.settle()

    def summarize(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        write_json(self.folder / SUMMARY_FILE, summary)


def _drop_lines_from(
    path: Path, first_step: int, *, every_step: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Keeps the lines of earlier steps -> their records, and what there is to say of lines that are damaged or missing.

    A kill may cut the last line, which is of a later step. With `every_step` each step from 1 on has a line.
    """
    if not path.is_file():
        return [], [f"{path} is gone, and the lines of the steps before {first_step}"] if first_step > 1 else []
    kept, records, damaged = [], [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        record = _record_of(line)
        if record is None:
            damaged += number + 1 < len(lines)
        elif record["step"] < first_step:
            kept.append(line + b"\n")
            records.append(record)
    write_bytes(path, b"".join(kept))
    said = [f"{path}: {damaged} damaged lines are left out"] if damaged else []
    steps = {record["step"] for record in records}
    if missing := sorted(set(range(1, first_step)) - steps) if every_step else []:
        first_ones = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        said.append(f"{path}: no line of {len(missing)} steps ({first_ones})")
    return records, said


def _record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line, which has a step; None where it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
