"""The recipe in a run's folder, recipe.json: what is saved, how later versions of the schema read it, what must agree.

The file holds every key and the version of its format. Files without a version hold what defines the experiment alone;
the keys that they lack, and those that the schema gained since, have their defaults.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.recipe_files import RENAMED, parse_recipe, rename_keys

RECIPE_FILE = "recipe.json"
VERSION = 2
_RENAMED_SINCE_1 = {"optimizer.distributed": "parallel.use_distributed_optimizer"}


def saved_form(recipe: Recipe) -> dict[str, Any]:
    """What recipe.json holds."""
    return {"version": VERSION, "recipe": resolved(recipe)}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every key of the recipe, with the options of its shaping, loss and correction that it leaves out.

    So it does not change with the table of methods, or with the defaults of a later version.
    """
    settings = recipe.model_dump(mode="json")
    algorithm = recipe.make_algorithm()
    for part, options in (
        ("loss", algorithm.loss_settings.options),
        ("shaping", algorithm.shaping_options),
        ("correction", algorithm.correction.options),
    ):
        settings["algorithm"][part] |= {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
        }
    return settings


def read_saved_recipe(path: Path) -> Recipe:
    """A recipe.json, of this version or an older one, in today's schema.

    Raises:
        RecipeError: naming the file, and the key that today's schema does not know or the version that is newer.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not valid JSON: {error}") from error
    version = saved.get("version", 1)
    if version > VERSION:
        raise RecipeError(f"{path} has format version {version}, this eapo_megatron reads up to {VERSION}")
    settings = rename_keys(saved, _RENAMED_SINCE_1, source=str(path)) if version == 1 else saved["recipe"]
    return parse_recipe(rename_keys(settings, RENAMED, source=str(path)), source=str(path))


def check_run_folder(recipe: Recipe) -> None:
    """Whether the run folder can be written, and is new or holds this very experiment.

    Raises:
        RecipeError: naming the first key that differs, or one that today's schema does not know.
    """
    _check_writable(recipe)
    path = recipe.run_folder / RECIPE_FILE
    if not path.is_file():
        return
    for key, (before, now) in _differences(experiment(read_saved_recipe(path)), experiment(recipe)).items():
        raise RecipeError(
            f"run folder {recipe.run_folder} holds another experiment: {key} was {before!r} there and is {now!r} here; "
            "give this run another name"
        )


def _check_writable(recipe: Recipe) -> None:
    named = f"logging.run_dir {recipe.logging.run_dir}"
    try:
        there = next(folder for folder in (recipe.run_folder, *recipe.run_folder.parents) if folder.exists())
    except OSError as error:
        raise RecipeError(f"{named}: {error.strerror}") from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"{named}: {there} is not a folder that can be written")


def experiment(recipe: Recipe) -> dict[str, Any]:
    """The settings that define the experiment: a resumed run must agree on them.

    How long, on what layout and with what records a run goes may differ between its parts.
    """
    settings = resolved(recipe)  # an option that is left out is one with its default
    for free in ("method", "cluster", "parallel", "logging", "checkpoint", "evaluation"):
        del settings[free]
    for section, key in (
        ("train", "steps"),
        ("train", "micro_batch_size"),
        ("train", "packing"),
        ("train", "micro_batch_tokens"),
        ("train", "max_skipped_in_a_row"),
        ("rollout", "max_batch_size"),
        ("rollout", "vllm"),
        ("rollout", "verify_weights"),
        ("reward", "num_workers"),
        ("model", "recompute"),
        ("model", "attention_backend"),
        ("algorithm", "reference_on_host"),
    ):
        del settings[section][key]
    del settings["model"]["head"]["backend"]
    # The optimizer's state has another form on disk.
    settings["parallel"] = {"use_distributed_optimizer": recipe.parallel.use_distributed_optimizer}
    return settings


def fingerprint(value: Any) -> str:
    """A short digest of JSON-like settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in sorted(before.keys() | now.keys()):
            found |= _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if before == now else {key: (before, now)}
