"""Checkpoints in the middle of training, under every kind of optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layouts import LAYOUTS

Measured = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.resumes])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(name: str, measured: Measured) -> None:
    assert measured(name)["resumed"] == {"moved": True, "loaded": True, "resumed": True, "schedule": True}


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.continues])
def test_a_checkpoint_goes_on_under_another_layout(name: str, measured: Measured) -> None:
    origin = LAYOUTS[name].continues
    assert origin is not None
    before, expected = measured(origin)["weights"], measured(origin)["later_weights"]
    actual = measured(name)["later_weights"]
    assert actual.keys() == expected.keys()
    moved = max((expected[key] - before[key]).abs().max() for key in expected)
    assert max((actual[key] - expected[key]).abs().max() for key in expected) < 1e-4 * moved
