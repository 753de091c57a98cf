"""Experiment trackers: TensorBoard, W&B, MLflow. A new one is one class and one line in `TRACKERS`, and its key."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from eapo_megatron.config import Logging, Recipe, RecipeError


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars for `tensorboard --logdir`."""

    def __init__(self, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(recipe.run_folder / "tensorboard"), purge_step=first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run that goes on under the same id after a resume (not run here)."""

    def __init__(self, recipe: Recipe, first_step: int) -> None:
        import wandb

        name = recipe.name
        self._run = wandb.init(project=recipe.logging.wandb_project, name=name, id=name, resume="allow")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run (not run here)."""

    def __init__(self, recipe: Recipe, first_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(recipe.logging.mlflow_experiment)
        mlflow.start_run(run_name=recipe.name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class TrackerKind(NamedTuple):
    """A tracker that the key `logging.KEY` turns on."""

    key: str
    package: str  # that must be installed
    open: Callable[[Recipe, int], Tracker]  # from the recipe and the first step to log


TRACKERS = (
    TrackerKind("tensorboard", "tensorboard", TensorBoard),
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


def open_trackers(recipe: Recipe, first_step: int) -> list[Tracker]:
    """The trackers named in the recipe."""
    return [kind.open(recipe, first_step) for kind in TRACKERS if getattr(recipe.logging, kind.key)]
