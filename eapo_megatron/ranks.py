"""What one process does as a rank of `eapo-megatron train` or `evaluate`: from its settings to its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.failures import report_failure
from eapo_megatron.launcher import check_devices
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.rollout.vllm_release import check_addresses
from eapo_megatron.run_lock import RunLock
from eapo_megatron.stopping import InterruptedRunError, StopRequest, TrainingStoppedError

if TYPE_CHECKING:
    from eapo_megatron.evaluation.command import Evaluation
    from eapo_megatron.training.preflight import Ingredients


class Prepare(Protocol):
    """`prepare_evaluation` of one command line."""

    def __call__(self, *, reads_benchmarks: bool) -> Evaluation: ...


def check_recipe(settings: Recipe, *, source: str) -> None:
    """Whether all that the recipe names is there and fits, in a process that is no rank.

    Raises:
        RecipeError: one sentence naming the key, the file or the tensor.
    """
    from eapo_megatron.training.preflight import prepare  # transformers: seconds

    prepare(settings, settings.cluster.world_size, source=source)


def train_rank(recipe: str, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
    """Trains as the rank that `environment` names."""
    with _one_of_node_speaks(environment):
        settings, stop_request = load_recipe(recipe, overrides), StopRequest()
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        _check_world(settings, world_size)
        check_devices(settings, int(environment["LOCAL_RANK"]))
        check_addresses(settings)
        from eapo_megatron.training.preflight import prepare  # transformers: seconds

        ingredients = prepare(settings, world_size, source=recipe, reads_benchmarks=rank == 0)
        locked = RunLock(settings.run_folder) if rank == 0 else nullcontext()
        with locked as lock, _reported(settings.run_folder / "errors", rank=rank):
            _train(settings, ingredients, stop_request, lock)


def evaluate_rank(prepare: Prepare, environment: Mapping[str, str]) -> None:
    """Evaluates as the rank that `environment` names; the first one reports."""
    rank = int(environment["RANK"])
    with _one_of_node_speaks(environment):
        evaluation = prepare(reads_benchmarks=rank == 0)
        _check_world(evaluation.examination.recipe, int(environment["WORLD_SIZE"]))
        check_devices(evaluation.examination.recipe, int(environment["LOCAL_RANK"]))
    evaluation.say_left_out()
    with _reported(evaluation.file.folder / "errors", rank=rank):
        from eapo_megatron.megatron_compat.importing import import_megatron  # megatron: seconds

        import_megatron()
        from eapo_megatron.evaluation.answers import answer_as_rank
        from eapo_megatron.evaluation.command import report_evaluation

        answer_as_rank(evaluation.examination, evaluation.file)
        if rank == 0:
            report_evaluation(evaluation)


@contextmanager
def _one_of_node_speaks(environment: Mapping[str, str]) -> Iterator[None]:
    """All ranks of a node find the same mistake."""
    os.environ.update(environment)
    try:
        yield
    except RecipeError as error:
        if environment["LOCAL_RANK"] == "0":
            raise
        raise typer.Exit(2) from error


def _check_world(settings: Recipe, world_size: int) -> None:
    cluster = settings.cluster
    if world_size != cluster.world_size:
        raise RecipeError(
            f"WORLD_SIZE {world_size} is not the recipe's world: cluster.num_nodes {cluster.num_nodes} x "
            f"gpus_per_node {cluster.gpus_per_node} = {cluster.world_size}"
        )


@contextmanager
def _reported(folder: Path, *, rank: int) -> Iterator[None]:
    """What goes wrong on a rank is told once, with its traceback in a file of `folder`."""
    try:
        yield
    except (typer.Exit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of this rank alone, perhaps; torch's CheckpointException is no Exception
        report_failure(error, folder, rank=rank)
        raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from error


def _train(settings: Recipe, ingredients: Ingredients, stop_request: StopRequest, lock: RunLock | None) -> None:
    from eapo_megatron.megatron_compat.importing import import_megatron  # megatron: seconds

    import_megatron()
    from eapo_megatron.policy.runtime import start_runtime, stop_runtime
    from eapo_megatron.training.loop import train
    from eapo_megatron.training.session import open_run

    runtime = start_runtime(
        settings.parallel,
        seed=settings.seed,
        device=settings.cluster.device,
        timeout_minutes=settings.cluster.timeout_minutes,
    )
    try:
        with open_run(settings, ingredients, runtime, stop_request, lock) as run:
            summary = train(run)
    except TrainingStoppedError as error:  # on every rank alike
        if runtime.is_main:
            print(error if isinstance(error, InterruptedRunError) else f"error: {error}", file=sys.stderr)
        stop_runtime()
        raise typer.Exit(error.exit_code) from error
    if runtime.is_main:
        print(outcome(settings.run_folder, summary))
    stop_runtime()


def outcome(folder: Path, summary: Mapping[str, Any]) -> str:
    """A run's last line: where it is, and what came of it."""
    rates = [summary["held_out"][f"solve_rate_{moment}"] for moment in ("start", "end")]
    held_out = "" if None in rates else ", held-out solve rate {:.1%} -> {:.1%}".format(*rates)
    return f"{folder}: step {summary['step']}{held_out}"
