"""Scoring and training hold no logits: their memory stays a small part of what the logits alone would take."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import result_of
from layouts import LONG_RESPONSES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("call", ["scoring", "training"])
def test_peak_memory_is_a_fraction_of_the_logits(call: str, tied: bool, launch_of_1: Path) -> None:
    peaks = result_of(launch_of_1, LONG_RESPONSES)
    assert peaks["logits", tied][call] > 1  # they are materialised there, so the measure sees them
    # The embedding's and the head's gradients are 1 / 64 of the logits each.
    assert peaks[None, tied][call] < 0.1
