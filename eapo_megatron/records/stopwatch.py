"""Seconds of each phase of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Seconds of each named phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start

    def lap(self) -> dict[str, float]:
        """The phases so far as metrics; counting starts again from 0."""
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return metrics
