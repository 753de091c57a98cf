"""The types and ranges of config.json's keys: what a family reads is checked before anything is computed with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

HFConfig = Mapping[str, Any]


class UnsupportedModelError(ValueError):
    """A config.json that asks for something the mapping does not honour."""


class Key(Protocol):
    """What one key may hold."""

    @property
    def required(self) -> bool:
        """Whether the key must be there and not be null."""
        ...

    def __str__(self) -> str:
        """What the key may hold, in words."""
        ...

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Integer:
    """An integer; neither a bool nor a float without a fraction."""

    high: int
    low: int = 1
    required: bool = True

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def allows(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Real:
    """A finite number."""

    high: float
    low: float = 0.0
    low_included: bool = False
    required: bool = False

    def __str__(self) -> str:
        return f"a number {'from' if self.low_included else 'above'} {self.low:g} to {self.high:g}"

    def allows(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        return self.low < value <= self.high or (self.low_included and value == self.low)


@dataclass(frozen=True)
class Of:
    """A value of one type; the elements of a list of one type too."""

    kind: type
    words: str
    elements: type | None = None
    required: bool = False

    def __str__(self) -> str:
        return self.words

    def allows(self, value: Any) -> bool:
        if type(value) is not self.kind:
            return False
        return not isinstance(value, list) or all(type(element) is self.elements for element in value)


FLAG = Of(bool, "true or false")
TEXTS = Of(list, "a list of texts", str)
NUMBERS = Of(list, "a list of integers", int)
MAPPING = Of(dict, "a mapping")


def check_keys(keys: Mapping[str, Key], held: HFConfig, *, of: str, inside: str = "") -> None:
    """Whether `held` has the required keys and each of `keys` is of its type and range.

    `of` names what needs the keys, `inside` what an error's key begins with.

    Raises:
        UnsupportedModelError: naming the key.
    """
    for name, key in keys.items():
        value = held.get(name)
        if value is None:
            if key.required:
                raise UnsupportedModelError(f"{inside}{name} is missing for {of}")
        elif not key.allows(value):
            raise UnsupportedModelError(f"{inside}{name} must be {key}, got {_shortened(value)}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
