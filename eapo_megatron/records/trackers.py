"""Experiment trackers: TensorBoard, W&B, MLflow. A new one is one class and one line in `TRACKERS`, and its key.

A run that was killed resumes from its last checkpoint and does the later steps again. TensorBoard is live: it drops
those steps, as metrics.jsonl does. W&B and MLflow cannot take a step back, so they get a step once a checkpoint holds
it. Their curves lag by up to `checkpoint.every` steps (with 0, they come at the end), and in return they have each step
once, with the value that counts, after a kill at any moment:

- The run folder's trackers.json holds the id of the run there. Runs of one name in two folders are two runs; a folder
  that is deleted starts a new one. A folder that was moved goes on with its run, and so does a copy: delete
  trackers.json in a copy that is to be a run of its own.
- A start gives a tracker all steps of metrics.jsonl that the tracker lacks: what a kill kept from it, what a failure
  kept from it, or all, where the tracker is named for the first time.
- A run that goes back behind steps that were given (its newer checkpoints were deleted) becomes a new run there.
- A tracker that fails does not end training: the steps wait for the next checkpoint, which tries again.

W&B offline (WANDB_MODE=offline) keeps its files in the run folder's `wandb`. Each start writes a folder with all steps
from the first one on, because `wandb sync` of a folder replaces what an earlier one of the same id brought: sync the
newest.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from eapo_megatron.config import Logging, Recipe, RecipeError
from eapo_megatron.durable import write_json

TRACKERS_FILE = "trackers.json"


class Start(NamedTuple):
    """What a tracker is opened with, beside the recipe."""

    first_step: int  # that this start does
    run_id: str  # of the run folder


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One step, in ascending order. One that is not live leaves out what an earlier start gave it."""

    def close(self) -> None: ...


class TensorBoard:
    """Scalars for `tensorboard --logdir`."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(recipe.run_folder / "tensorboard"), purge_step=start.first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its thread writes: a kill would take what it has not reached

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, which a server goes on with under the same id."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        import wandb

        self._run = wandb.init(
            project=recipe.logging.wandb_project,
            name=recipe.name,
            id=start.run_id,
            resume="allow",
            dir=str(recipe.run_folder),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step >= self._run.starting_step:  # after the last one that the server holds; offline: 0
            self._run.log(metrics, step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run, found again by a tag that holds the run folder's id."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        from mlflow import MlflowClient

        self._client, name = MlflowClient(), str(recipe.logging.mlflow_experiment)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        tag = "eapo_megatron.run_id"
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{start.run_id}'")
        run = found[0] if found else self._client.create_run(experiment, run_name=recipe.name, tags={tag: start.run_id})
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        # By metric: a kill may have come between two metrics of a step.
        self._last_steps = {
            name: max(metric.step for metric in self._client.get_metric_history(self._id, name))
            for name in run.data.metrics
        }

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        allowed = {name.replace("@", "_at_"): value for name, value in metrics.items()}  # no @ in MLflow's names
        new = {name: value for name, value in allowed.items() if step > self._last_steps.get(name, -1)}
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in new.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class TrackerKind(NamedTuple):
    """A tracker that the key `logging.KEY` turns on."""

    key: str
    package: str  # that must be installed
    open: Callable[[Recipe, Start], Tracker]
    live: bool = (
        False  # drops the steps from `first_step` on when it is opened; else it gets steps with their checkpoint
    )


TRACKERS = (
    TrackerKind("tensorboard", "tensorboard", TensorBoard, live=True),
    TrackerKind("wandb_project", "wandb", WandB),
    TrackerKind("mlflow_experiment", "mlflow", MLflow),
)


def check_trackers(logging: Logging) -> None:
    """Whether the trackers that the recipe names are installed.

    Raises:
        RecipeError: naming the key and the package.
    """
    for kind in TRACKERS:
        if getattr(logging, kind.key) and find_spec(kind.package) is None:
            raise RecipeError(f"logging.{kind.key} needs the package {kind.package}, which is not installed")


class Trackers:
    """The trackers named in the recipe. `earlier`: the lines of metrics.jsonl before `first_step`."""

    def __init__(
        self, recipe: Recipe, first_step: int, earlier: list[dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        kinds = [kind for kind in TRACKERS if getattr(recipe.logging, kind.key)]
        self._file, self._next_step = recipe.run_folder / TRACKERS_FILE, first_step
        start = Start(first_step, self._saved_id(say) or secrets.token_hex(8))
        self._run_id = start.run_id
        if not all(kind.live for kind in kinds):
            self._save()
        self._live = [kind.open(recipe, start) for kind in kinds if kind.live]
        self._following = [_Following(kind, recipe, start, say) for kind in kinds if not kind.live]
        for line in earlier:
            metrics = {name: math.nan if value is None else value for name, value in line.items() if name != "step"}
            for tracker in self._following:
                tracker.log(metrics, line["step"])
        self.settle()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One step, which a resume may still take back."""
        self._next_step = step + 1
        for tracker in (*self._live, *self._following):
            tracker.log(metrics, step)

    def settle(self) -> None:
        """Gives the steps so far to all trackers: a checkpoint holds them."""
        if self._following:
            self._save()
        for tracker in self._following:
            tracker.settle()

    def close(self) -> None:
        for tracker in (*self._live, *self._following):
            tracker.close()

    def _save(self) -> None:
        """Before a tracker knows of it: a kill in between must not leave it more than trackers.json tells."""
        write_json(self._file, {"run_id": self._run_id, "next_step": self._next_step})

    def _saved_id(self, say: Callable[[str], None]) -> str | None:
        """The id in trackers.json, where the run goes on from there."""
        if not self._file.is_file():
            return None
        saved = json.loads(self._file.read_text(encoding="utf-8"))
        if saved["next_step"] <= self._next_step:
            return saved["run_id"]
        say(f"trackers hold steps up to {saved['next_step'] - 1}: from step {self._next_step} on it is a new run there")
        return None


class _Following:
    """A tracker behind the checkpoints: steps wait until they are settled, and longer where the tracker fails."""

    def __init__(self, kind: TrackerKind, recipe: Recipe, start: Start, say: Callable[[str], None]) -> None:
        self._key, self._say = kind.key, say
        self._open = lambda: kind.open(recipe, start)
        self._tracker: Tracker | None = self._open()
        self._waiting: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._waiting.append((metrics, step))

    def settle(self) -> None:
        with self._failing_alone("the next checkpoint or start tries again"):
            tracker = self._tracker or self._open()
            self._tracker = None  # after a failure it is asked again what it holds
            for metrics, step in self._waiting:
                tracker.log(metrics, step)
            self._tracker = tracker
            self._waiting.clear()

    def close(self) -> None:
        if self._tracker is not None:
            with self._failing_alone("it may lack the last steps, which the next start gives it"):
                self._tracker.close()

    @contextmanager
    def _failing_alone(self, consequence: str) -> Iterator[None]:
        """Whatever the package raises is said; nothing is lost, as metrics.jsonl has all steps."""
        try:
            yield
        except Exception as error:
            self._say(f"logging.{self._key}: {type(error).__name__}: {error}; {consequence}")
