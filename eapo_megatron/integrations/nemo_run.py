"""NeMo recipes: a run of `eapo-megatron train` as NeMo-Run launches things (nemo-run 0.4.0).

    import nemo_run as run
    from eapo_megatron.integrations.nemo_run import eapo_recipe, slurm_executor

    recipe = eapo_recipe("recipes/NAME.yaml", ["train.steps=100"])
    executor = slurm_executor("recipes/NAME.yaml", account="research", container_image="eapo.sqsh")
    run.run(recipe, executor=executor)

Nodes and ranks are read from the recipe's `cluster` section, so they are written in one place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import nemo_run as run

from eapo_megatron.config import RecipeError
from eapo_megatron.recipe_files import load_recipe


def train(recipe: str, overrides: list[str]) -> None:
    """One rank of `eapo-megatron train RECIPE OVERRIDES`, as torchrun started it; ends the process with its code."""
    from eapo_megatron.cli import main  # only where the ranks are

    sys.argv = ["eapo-megatron", "train", recipe, *overrides]
    main()


@run.cli.factory(target=train, name="eapo_recipe")
def eapo_recipe(recipe: str, overrides: Sequence[str] = ()) -> run.Partial[train]:  # type: ignore[valid-type]
    """The run of a recipe file with dotted overrides.

    Raises:
        RecipeError: for a wrong one, in one sentence.
    """
    load_recipe(recipe, overrides)
    return run.Partial(train, recipe=recipe, overrides=list(overrides))


def local_executor(recipe: str, overrides: Sequence[str] = ()) -> run.LocalExecutor:
    """This machine, one process a rank."""
    cluster = load_recipe(recipe, overrides).cluster
    if cluster.num_nodes > 1:
        raise RecipeError(f"{recipe}: cluster.num_nodes is {cluster.num_nodes}; a local executor has one node")
    return run.LocalExecutor(ntasks_per_node=cluster.gpus_per_node, launcher="torchrun")


def slurm_executor(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    account: str,
    container_image: str,
    container_mounts: Sequence[str] = (),
    time: str = "04:00:00",
    **options: Any,
) -> run.SlurmExecutor:
    """A SLURM cluster with pyxis; `options` are further ones of run.SlurmExecutor (partition, tunnel, packager ...)."""
    cluster = load_recipe(recipe, overrides).cluster
    return run.SlurmExecutor(
        account=account,
        nodes=cluster.num_nodes,
        ntasks_per_node=cluster.gpus_per_node,
        gpus_per_node=None if cluster.device == "cpu" else cluster.gpus_per_node,
        container_image=container_image,
        container_mounts=list(container_mounts),
        time=time,
        launcher="torchrun",
        **options,
    )
