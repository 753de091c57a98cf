"""The recipe's keys as a user looks them up: path, type, default, description, read from the schema of `config`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from eapo_megatron.algorithms import CORRECTIONS, LOSSES, SHAPINGS
from eapo_megatron.algorithms.registry import default_options
from eapo_megatron.config import Recipe, RecipeError, Section

# Sections whose `name` chooses a function, whose options are keys of the section too.
REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "algorithm.shaping": SHAPINGS,
    "algorithm.loss": LOSSES,
    "algorithm.correction": CORRECTIONS,
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key of the recipe, as text."""

    path: str
    type: str  # with its bounds, or the choices
    default: str  # as YAML has it; empty where there is none
    description: str


def recipe_keys(pattern: str = "") -> list[Key]:
    """The keys whose path or description contains `pattern`, or matches it as a shell glob, in the schema's order.

    Case is ignored. The options of shapings and losses follow the keys of their sections.

    Raises:
        RecipeError: when there is none.
    """
    pattern = pattern.lower()
    glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    found = [
        key
        for _, _, keys in _sections(Recipe, "")
        for key in keys
        if any(fnmatchcase(text.lower(), glob) for text in (key.path, key.description))
    ]
    if not found:
        raise RecipeError(f"no key or description matches {pattern!r}")
    return found


def keys_page() -> str:
    """docs/keys.md: a table for each section."""
    lines = [
        "# Recipe keys",
        "",
        "Written by `eapo-megatron keys --markdown` from `eapo_megatron/config/`. "
        "`eapo-megatron keys PATTERN` finds a key by a part of its path or description.",
    ]
    for path, title, keys in _sections(Recipe, ""):
        lines += ["", f"## {path or 'The run'}", "", title, "", *_table(keys)]
    return "\n".join(lines) + "\n"


def _table(keys: Iterable[Key]) -> Iterator[str]:
    yield "| key | type | default | description |"
    yield "|---|---|---|---|"
    for key in keys:
        path, kind, default, description = (cell.replace("|", "\\|") for cell in astuple(key))
        yield f"| `{path}` | `{kind}` | {default and f'`{default}`'} | {description} |"


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, str, list[Key]]]:
    """Each section below `path` -> its path, what it is, and its own keys."""
    keys: list[Key] = []
    below: list[tuple[type[Section], str]] = []
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            below.append((field.annotation, key))
        else:
            keys.append(Key(key, _type_of(field), _default_of(field), field.description or ""))
    if path in REGISTRIES:
        keys += _options(path, REGISTRIES[path])
    yield path, " ".join(inspect.cleandoc(section.__doc__ or "").split()), keys
    for inner, key in below:
        yield from _sections(inner, key)


def _options(path: str, registry: Mapping[str, Callable[..., Any]]) -> Iterator[Key]:
    """The options of the functions that `path`.name chooses from."""
    for name, function in registry.items():
        first_line = inspect.cleandoc(function.__doc__ or "").split("\n")[0]
        for option, default in default_options(function).items():
            kind = str(inspect.signature(function).parameters[option].annotation)
            kind = kind.replace("Sequence[str]", "list of str")
            yield Key(f"{path}.{option}", kind, json.dumps(default), f"Of {name}: {first_line}")


def _type_of(field: FieldInfo) -> str:
    bounds = []
    for constraint in field.metadata:
        for name, sign in _BOUNDS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                bounds.append(f"{sign} {bound}")
        if (pattern := getattr(constraint, "pattern", None)) is not None:
            bounds.append(f"matching {pattern}")
    kinds = _kinds(field.annotation)
    return " or ".join([" ".join([kinds[0], " and ".join(bounds)]).strip(), *kinds[1:]])


def _kinds(annotation: Any) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [", ".join(str(choice) for choice in arguments)]
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    if origin is list:
        return [f"list of {_kinds(arguments[0])[0]}"]
    if origin is dict:
        return ["mapping"]
    return ["null" if annotation is NoneType else annotation.__name__]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default()
    return value if isinstance(value, str) and value else json.dumps(value)
