"""What a run leaves behind: metrics.jsonl, samples.jsonl, TensorBoard (W&B, MLflow), a progress bar, summary.json.

Only rank 0 writes. A resumed run first drops the lines after its checkpoint, so the files hold each step once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eapo_megatron.config import Logging, Recipe, RecipeError

METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE = "metrics.jsonl", "samples.jsonl", "summary.json"
_SECONDS_BETWEEN_LINES = 5.0


class Tracker(Protocol):
    """An experiment tracker: TensorBoard, W&B or MLflow."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Stopwatch:
    """Seconds of each named phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start

    def lap(self) -> dict[str, float]:
        """The phases so far as metrics, and starts anew."""
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return metrics


class Records:
    """The records of one run from `first_step` on; a context manager."""

    def __init__(self, recipe: Recipe, *, first_step: int) -> None:
        self.folder = recipe.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            _drop_lines_from(self.folder / name, first_step)
        self._metrics = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        self._samples = (self.folder / SAMPLES_FILE).open("a", encoding="utf-8")
        self._trackers = start_trackers(recipe, first_step)
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

    def __enter__(self) -> Records:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._samples.close()
        for tracker in self._trackers:
            tracker.close()

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
        self._progress.console.print(line, highlight=False)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics to every record."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log(metrics, step)

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

    def summarize(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        write_json(self.folder / SUMMARY_FILE, summary)


class TensorBoard:
    """Scalars for `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run that goes on under the same id after a resume (not run here)."""

    def __init__(self, project: str, name: str) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, id=name, resume="allow")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run (not run here)."""

    def __init__(self, experiment: str, name: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def check_trackers(logging: Logging) -> None:
    """Whether the trackers that the recipe names are installed.

    Raises:
        RecipeError: naming the key and the package.
    """
    from importlib.util import find_spec

    named = {"wandb_project": "wandb", "mlflow_experiment": "mlflow"}
    for key, package in named.items():
        if getattr(logging, key) is not None and find_spec(package) is None:
            raise RecipeError(f"logging.{key} needs the package {package}, which is not installed")


def start_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """The trackers named in the recipe."""
    trackers: list[Tracker] = []
    if recipe.logging.tensorboard:
        trackers.append(TensorBoard(recipe.run_folder / "tensorboard", first_step))
    if recipe.logging.wandb_project is not None:
        trackers.append(WandB(recipe.logging.wandb_project, recipe.name))
    if recipe.logging.mlflow_experiment is not None:
        trackers.append(MLflow(recipe.logging.mlflow_experiment, recipe.name))
    return trackers


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary name, flushes it, and renames it."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Keeps the whole lines of earlier steps; a line cut by a kill goes too."""
    if not path.is_file():
        return
    kept = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n") or json.loads(line)["step"] >= first_step:
                break
            kept.append(line)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.rename(path)
