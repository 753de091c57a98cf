"""The command line: `eapo-megatron train RECIPE [key.path=value ...]`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Annotated

import typer
from omegaconf import OmegaConf

from eapo_megatron.config import Recipe, RecipeError, load_recipe
from eapo_megatron.launcher import rank_environment, run_local_ranks

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def cli() -> None:
    """Entropy-aware policy optimization on Megatron."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, such as recipes/NAME.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Trains a recipe, or goes on with it from its last checkpoint.

    Under torchrun or srun this process is one of the ranks; started bare, it starts them.
    """
    overrides = overrides or []
    settings = load_recipe(recipe, overrides)
    if dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json"))), end="")
        return
    environment = rank_environment(os.environ)
    if environment is not None:
        os.environ.update(environment)
        _train_rank(settings, source=recipe)
        return
    if settings.cluster.num_nodes > 1:
        raise RecipeError(f"{recipe}: cluster.num_nodes {settings.cluster.num_nodes} needs srun or torchrun")
    _prepare(settings, settings.cluster.world_size, source=recipe)
    raise typer.Exit(run_local_ranks(settings.cluster.world_size, ["train", recipe, *overrides]))


def _prepare(settings: Recipe, world_size: int, *, source: str):  # type: ignore[no-untyped-def]
    from eapo_megatron.training.preflight import prepare  # transformers: seconds

    return prepare(settings, world_size, source=source)


def _train_rank(settings: Recipe, *, source: str) -> None:
    ingredients = _prepare(settings, int(os.environ["WORLD_SIZE"]), source=source)
    # megatron-core tells every rank which optional GPU packages it does without, and torch of its own deprecations.
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\.")

    from eapo_megatron.models.runtime import start_runtime, stop_runtime  # megatron: seconds
    from eapo_megatron.training.loop import train as train_run
    from eapo_megatron.training.run import TrainingStoppedError, open_run

    runtime = start_runtime(
        settings.parallel,
        seed=settings.seed,
        device=settings.cluster.device,
        timeout_minutes=settings.cluster.timeout_minutes,
    )
    try:
        with open_run(settings, ingredients, runtime) as run:
            summary = train_run(run)
    except TrainingStoppedError as error:  # on every rank alike
        if runtime.is_main:
            print(f"error: {error}", file=sys.stderr)
        stop_runtime()
        raise typer.Exit(1) from error
    if runtime.is_main:
        print(json.dumps(summary["held_out"]))
    stop_runtime()


def main() -> None:
    """Runs the command line; a wrong recipe, or what it points at, is one line and exit code 2."""
    try:
        app()
    except RecipeError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
