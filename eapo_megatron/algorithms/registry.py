"""Functions chosen by name: their options are the keyword arguments of their signatures, `process_group` aside.

So a new method with an option is one function and one line in its registry. The function checks the range of its own
options, in a ValueError that begins with the option's name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def choose(key: str, name: object, registry: Mapping[str, Function]) -> Function:
    """The function called `name`.

    Raises:
        ValueError: the registry has none, one sentence that begins with `key` and lists the names.
    """
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"{key} must be one of {', '.join(registry)}, got {name!r}")
    return registry[name]


def imported(key: str, path: str) -> Callable[..., Any]:
    """The user's function at `path`, package.module:function.

    Raises:
        ValueError: it cannot be imported, or is no function; one sentence that begins with `key`.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises as it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            reason += " (its folder must be on PYTHONPATH)"
        raise ValueError(f"{key} {path!r} cannot be imported: {reason}") from error
    if not callable(function):
        raise ValueError(f"{key} {path!r} is no function but {type(function).__name__}")
    return function


def reads(*fields: str) -> Callable[[Function], Function]:
    """Declares which optional fields of its inputs a function reads, so that a trainer knows what to compute."""

    def declare(function: Function) -> Function:
        function.reads = frozenset(fields)  # type: ignore[attr-defined]
        return function

    return declare


def read_by(function: Callable[..., Any] | None) -> frozenset[str]:
    """The optional fields that the function declared with `reads`."""
    return getattr(function, "reads", frozenset())


def default_options(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's options by name, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "process_group"
    }


def complete_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], *, beside: Collection[str] = ()
) -> dict[str, Any]:
    """All options of the function: those given, and the defaults of the others.

    what: names the function in errors, such as "the loss 'clipped_surrogate'"; beside: further keys that errors list.

    Raises:
        ValueError: an option is unknown, or no number where the default is one; begins with the option's name.
    """
    defaults = default_options(function)
    for name, value in options.items():
        check_known(name, [*beside, *defaults], what)
        if isinstance(defaults[name], (int, float)) and not isinstance(defaults[name], bool):
            check_number(name, value)
    return {**defaults, **options}


def check_known(name: str, known: Collection[str], what: str) -> None:
    """Refuse a key that is not known, with the known ones and the closest."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        listed = f"the known ones are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{name} is not a key of {what}{hint}: {listed}")


def check_number(name: str, value: object) -> None:
    """Refuse what is not an integer or a floating-point number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
