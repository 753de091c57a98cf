"""How an attribute of megatron-core or torch is replaced at run time: for the process's life, or within a block.

Each replacement checks that its attribute exists, so a renamed private is an error that names it. Nothing outside this
file assigns to an attribute of either library; `replacements` lists all that is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """One attribute that is replaced."""

    owner: Any  # a module or class of megatron-core or torch
    name: str
    replacement: Callable[[Any], Any]  # the attribute -> what takes its place
    why: str
    until: str  # what makes it unnecessary
    read_by: Callable | None = None  # where the owner may lack the attribute: the function that reads it

    @property
    def label(self) -> str:
        """The attribute's full name."""
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    def check(self) -> None:
        """Looks for the attribute.

        Raises:
            AttributeError: where the installed megatron-core or torch has it no longer, with its full name.
        """
        known = hasattr(self.owner, self.name) if self.read_by is None else self.name in self.read_by.__code__.co_names
        if not known:
            raise AttributeError(f"{self.label} does not exist, but this package replaces it: {self.why}")

    def put(self) -> None:
        """Puts the replacement in the attribute's place."""
        setattr(self.owner, self.name, self.replacement(getattr(self.owner, self.name, None)))

    def undo(self, before: Any) -> None:
        """Puts back what the owner itself held; it may have inherited the attribute, or lacked it."""
        if before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, before)


_installed: set[Replacement] = set()


def install(replacements: Sequence[Replacement]) -> None:
    """Replaces attributes for the life of the process; those that already are stay so.

    Raises:
        AttributeError: where one does not exist; then none is replaced.
    """
    missing = [entry for entry in replacements if entry not in _installed]
    for entry in missing:
        entry.check()
    for entry in missing:
        entry.put()
        _installed.add(entry)


def is_installed(replacements: Sequence[Replacement]) -> bool:
    """Whether `install` was called for all of these."""
    return _installed.issuperset(replacements)


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Replaces attributes within a block.

    Raises:
        AttributeError: where one does not exist; then none is replaced.
    """
    for entry in replacements:
        entry.check()
    with ExitStack() as undoing:
        for entry in replacements:
            before = vars(entry.owner).get(entry.name, _ABSENT)
            entry.put()
            undoing.callback(entry.undo, before)
        yield


def instead(value: Any) -> Callable[[Any], Any]:
    """A value that has nothing of what it replaces."""
    return lambda _: value
