"""What all sections of a recipe share: unknown keys and values of another kind are refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 2**31 - 1  # of any whole number in a recipe: more is a slip, and would not fit where tensors hold it


class RecipeError(ValueError):
    """A recipe, or what it points at, that cannot be trained: one sentence naming the key, file or tensor."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what YAML and Python would let pass: true for 1, a NUL character in a text."""
        assert info.field_name is not None
        if cls.model_fields[info.field_name].annotation is not bool:
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, bool):
                    raise ValueError(f"must not be {str(part).lower()}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not hold a NUL character")
        return value

    @field_validator("*")
    @classmethod
    def _in_bounds(cls, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > LARGEST:
                raise ValueError(f"whole numbers must be at most {LARGEST} in size, got {number}")
        return value
