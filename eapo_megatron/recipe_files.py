"""Recipe files: one YAML file a run, inheriting a base, read into the typed settings of `config`.

A recipe names its parent by `defaults: base.yaml` and holds overrides only. Dotted overrides (`optimizer.lr=1e-6`)
come last. Recipes are found by path, and the built-in ones by name. Every error is one sentence that names the recipe
and the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from eapo_megatron.config import Recipe, RecipeError

BUILT_IN = Path(__file__).parent / "recipes"
RENAMED = {"data.layout": "data.format"}  # keys of older recipes: their names of today


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, found by `find_recipe`, with its parents and dotted overrides.

    Raises:
        RecipeError: one sentence naming the file and the key.
    """
    path = find_recipe(recipe)
    settings = _read_with_parents(path, seen=())
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(f"override {override!r} is not of the form key.path=value")
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.merge(settings, rename_keys(given, RENAMED, source=str(path)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {_first_line(error)}") from error
    assert isinstance(container, dict)
    container.setdefault("name", path.stem)
    return parse_recipe({str(key): value for key, value in container.items()}, source=str(path))


def find_recipe(name: str | Path, *, folder: Path = Path(), what: str = "recipe") -> Path:
    """A recipe's file: by its path from `folder`, or a built-in recipe by its name; with or without .yaml.

    Raises:
        RecipeError: when there is neither; with names that are close. It begins with `what`.
    """
    file = str(name).removesuffix(".yaml") + ".yaml"
    places = [folder / name, folder / file]
    if Path(file).name == file:
        places.append(BUILT_IN / file)
    for path in places:
        if path.is_file():
            return path
    stem, known = Path(file).name.removesuffix(".yaml"), list(built_in_recipes())
    close = [known_name for known_name in known if stem in known_name] or difflib.get_close_matches(stem, known)
    hint = f" (did you mean {' or '.join(close[:3])}?)" if close else ": `eapo-megatron recipes` lists these"
    raise RecipeError(f"{what} {name} is neither a file nor a built-in recipe{hint}")


def built_in_recipes() -> dict[str, str]:
    """What each built-in recipe is, by its name: its file's first line."""
    return {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(BUILT_IN.glob("*.yaml"))
    }


def copy_recipe(name: str, destination: Path) -> Path:
    """Copies a built-in recipe to a new file, or into a folder under its own name -> the file.

    Raises:
        RecipeError: when there is no such recipe, or the file is there already or cannot be written.
    """
    source = find_recipe(name, folder=BUILT_IN)
    path = destination / source.name if destination.is_dir() else destination
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {name} is not copied to {path}: {error.strerror}") from error
    return path


def parse_recipe(settings: dict[str, Any], *, source: str) -> Recipe:
    """Validates settings read from `source` (named in errors).

    Raises:
        RecipeError: one sentence naming the source and the first wrong key.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_problem(error)}") from error


def rename_keys(settings: Any, renamed: Mapping[str, str], *, source: str) -> Any:
    """Gives the dotted keys of `renamed` their new names, in place -> the settings.

    Raises:
        RecipeError: where the old and the new name are both given.
    """
    for old, new in renamed.items():
        *sections, last = old.split(".")
        held = settings
        for section in sections:
            held = held.get(section) if isinstance(held, dict) else None
        if not isinstance(held, dict) or last not in held:
            continue
        value = held.pop(last)
        *sections, last = new.split(".")
        held = settings
        for section in sections:
            held = held.setdefault(section, {})
        if last in held:
            raise RecipeError(f"{source}: {old} is the old name of {new}: give {new} alone")
        held[last] = value
    return settings


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> Any:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: defaults form a circle")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    rename_keys(settings, RENAMED, source=str(path))
    parent = settings.pop("defaults", None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: defaults must name one parent recipe")
    parent_path = find_recipe(parent, folder=path.parent, what=f"{path}: defaults")
    return OmegaConf.merge(_read_with_parents(parent_path, (*seen, path.resolve())), settings)


def _first_problem(error: ValidationError) -> str:
    """pydantic's first error as `key: what is wrong`."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1)
        return f"{key}: unknown key" + (f" (did you mean {close[0]}?)" if close else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
