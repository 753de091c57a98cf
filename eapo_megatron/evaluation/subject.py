"""What is evaluated: a run, one of its checkpoints or a Hugging Face folder, as a recipe with weights to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.recipe_files import overridden
from eapo_megatron.saved_recipe import RECIPE_FILE, read_saved_recipe
from eapo_megatron.weights.assets import CONFIG_FILE
from eapo_megatron.weights.megatron_weights import find_checkpoint


@dataclass(frozen=True)
class Subject:
    """The recipe says what model, template, lengths, layout and engine; `out` is where its evaluation goes."""

    recipe: Recipe
    out: Path


def find_subject(path: Path, overrides: Sequence[str]) -> Subject:
    """A run's saved recipe with its last whole checkpoint, a checkpoint of a run, or a Hugging Face folder.

    Overrides are on top of the run's recipe; of a Hugging Face folder, whose model, on top of every key's default.

    Raises:
        RecipeError: naming the folder that is none of these, the damaged checkpoint, or the key.
    """
    if (path / CONFIG_FILE).is_file():
        return _of_folder(path, overrides)
    run = next((folder for folder in (path, *path.absolute().parents[:2]) if (folder / RECIPE_FILE).is_file()), None)
    if run is None:
        raise RecipeError(
            f"{path} is no run ({RECIPE_FILE}), no checkpoint of one and no Hugging Face folder ({CONFIG_FILE})"
        )
    checkpoint = find_checkpoint(path, key="RUN").absolute()
    settings = read_saved_recipe(run / RECIPE_FILE).model_dump(mode="json")
    settings["model"]["checkpoint"] = str(checkpoint)
    return Subject(overridden(settings, overrides, source=str(run / RECIPE_FILE)), _out(run, checkpoint.name))


def _of_folder(path: Path, overrides: Sequence[str]) -> Subject:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.resolve().name).lstrip("._-") or "model"
    # A recipe has data to train on, which nothing reads here.
    of_folder: dict[str, Any] = {"name": name, "model": {"path": str(path)}, "data": {"train_path": str(path)}}
    return Subject(overridden(of_folder, overrides, source=str(path)), _out(Path(), name))


def _out(folder: Path, name: str) -> Path:
    return folder / "evaluation" / name
