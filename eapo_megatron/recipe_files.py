"""Recipe files: one YAML file a run, inheriting a base, read into the typed settings of `config`.

A recipe names its parent by `defaults: base.yaml` and holds overrides only. Dotted overrides (`optimizer.lr=1e-6`)
come last; the settings of `method` are below all others. Recipes are found by path, and the built-in ones by name.
Every error is one sentence that names the recipe and the key.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.config.methods import method_settings

BUILT_IN = Path(__file__).parent / "recipes"
RENAMED = {"data.layout": "data.format"}  # keys of older recipes: their names of today

_OVERRIDE = re.compile(r"[\w-]+(\.[\w-]+)*=.*", re.DOTALL)
_MAX_VALUES = 10_000  # in a file, with every alias written out
_NOT_READ = (OmegaConfBaseException, yaml.YAMLError, RecursionError)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, found by `find_recipe`, with its parents and dotted overrides.

    Raises:
        RecipeError: one sentence naming the file and the key.
    """
    path = find_recipe(recipe)
    settings = _read_with_parents(path, seen=())
    given = rename_keys(_read_overrides(overrides), RENAMED, source=str(path))
    try:
        container = OmegaConf.to_container(OmegaConf.create(_merged(settings, given)), resolve=True)
    except _NOT_READ as error:
        raise RecipeError(f"{path}: {_sentence(error)}") from error
    assert isinstance(container, dict)
    resolved = {"name": path.stem, **{str(key): value for key, value in container.items()}}
    if resolved.get("method") is not None:
        try:
            resolved = _merged(method_settings(resolved), resolved)
        except ValueError as error:
            place = "override" if _holds(given, ["method"]) else f"{path}:"
            raise RecipeError(f"{place} method: {error}") from error
    return parse_recipe(resolved, source=str(path), overrides=overrides)


def overridden(settings: dict[str, Any], overrides: Sequence[str], *, source: str) -> Recipe:
    """Settings of today's schema, read from `source`, with dotted overrides on top.

    Raises:
        RecipeError: one sentence naming the override, or the source and the key.
    """
    given = rename_keys(_read_overrides(overrides), RENAMED, source=source)
    return parse_recipe(_merged(settings, given), source=source, overrides=overrides)


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
        if os.path.isfile(path):  # whatever the name: Path.is_file raises for one that is too long
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
    if Path(name).name != name:
        raise RecipeError(f"recipe {name} is a path: --copy takes the name of a built-in recipe")
    source = find_recipe(name, folder=BUILT_IN)
    path = destination / source.name if os.path.isdir(destination) else destination
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {name} is not copied to {path}: {error.strerror}") from error
    return path


def parse_recipe(settings: dict[str, Any], *, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validates settings read from `source` and from dotted overrides of it.

    Raises:
        RecipeError: one sentence naming the source, or saying that it is an override, and the first wrong key.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        given = rename_keys(_read_overrides(overrides), RENAMED, source=source)
        place = "override " if _holds(given, _location(error)) else f"{source}: "
        raise RecipeError(place + _first_problem(error)) from error


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
    settings = _read_file(path)
    rename_keys(settings, RENAMED, source=str(path))
    parent = settings.pop("defaults", None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: defaults must name one parent recipe, got {_shown(parent)}")
    parent_path = find_recipe(parent, folder=path.parent, what=f"{path}: defaults")
    return _merged(_read_with_parents(parent_path, (*seen, path.resolve())), settings)


def _merged(below: Any, above: Any) -> Any:
    """`above` over `below`, key by key where both are mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _read_file(path: Path) -> dict[Any, Any]:
    """The keys and values of one file, interpolations as they stand."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode | None):
            raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
        if root is not None and _num_values(root, {}) > _MAX_VALUES:
            raise RecipeError(f"{path}: its aliases stand for more than {_MAX_VALUES} values")
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))  # type: ignore[return-value]
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    except _NOT_READ as error:
        raise RecipeError(f"{path}: not valid YAML: {_sentence(error)}") from error


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; aliases are nodes that are met again."""
    if id(node) not in known:
        known[id(node)] = 1  # within itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [value for _, value in parts]
        known[id(node)] += sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def _read_overrides(overrides: Sequence[str]) -> Any:
    """`key.path=value` of the command line as nested settings."""
    for override in overrides:
        if not _OVERRIDE.fullmatch(override):
            raise RecipeError(f"override {override!r} is not of the form key.path=value")
        try:
            OmegaConf.from_dotlist([override])
        except _NOT_READ as error:
            raise RecipeError(f"override {override!r}: {_sentence(error)}") from error
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (*_NOT_READ, TypeError) as error:
        raise RecipeError(f"overrides {' '.join(overrides)} contradict one another: {_sentence(error)}") from error


def _location(error: ValidationError) -> list[str]:
    """The names of the first wrong key, without its places in a list."""
    return [part for part in error.errors()[0]["loc"] if isinstance(part, str)]


def _holds(settings: Any, location: Sequence[str]) -> bool:
    """Whether nested settings give the value at this place, or one in which it would lie."""
    for name in location:
        if not isinstance(settings, dict):
            return settings is not None
        if name not in settings:
            return False
        settings = settings[name]
    return bool(location)


def _first_problem(error: ValidationError) -> str:
    """pydantic's first error as `key: what is wrong`."""
    problem, location = error.errors()[0], _location(error)
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
    return f"{key}: {message[0].lower()}{message[1:]}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _sentence(error: Exception) -> str:
    """What OmegaConf, YAML or Python says in one line, after the key where it is known."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or refers to itself"
    key, message = getattr(error, "full_key", None), str(getattr(error, "msg", None) or error)
    words = " ".join(message.split("full_key:")[0].split())
    return f"{key}: {words}" if key else words
