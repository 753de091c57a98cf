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
