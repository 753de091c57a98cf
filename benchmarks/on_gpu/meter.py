"""Time and memory of a call on a GPU or the CPU, and what a part of the command has found."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch

from benchmarks.measuring import profiled

WARM_UP = 3  # untimed calls before those that count


class CannotRunError(Exception):
    """Why a part cannot run here, in one line."""


@dataclass(frozen=True)
class Check:
    """A number and its bound. A target of speed or memory is reported; a bound of correctness fails the command."""

    name: str
    value: float
    bound: float
    at_least: bool = False  # value >= bound, else value <= bound
    is_target: bool = False

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Findings:
    """What a part measured, by name, and how it stands to its bounds."""

    numbers: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "numbers": self.numbers,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }


@dataclass(frozen=True)
class Measured:
    """A call: what it returned, seconds, and bytes beyond those allocated before."""

    result: Any
    seconds: float
    peak: int  # at once
    held: int  # when it was done


def measured(call: Callable[[], Any], device: torch.device) -> Measured:
    """One call on an idle device. On the CPU the profiler counts bytes, which makes the seconds longer."""
    gc.collect()  # or what earlier calls left could be set free during this one
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        gc.collect()  # cycles may hold what nothing uses
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Measured(result, seconds, peak - before, held - before)
    start = time.perf_counter()
    (result, _), allocations, _ = profiled(lambda: (call(), gc.collect()))
    seconds = time.perf_counter() - start
    return Measured(result, seconds, max(accumulate(allocations), default=0), sum(allocations))


def medians(calls: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Milliseconds of each call, by name: medians of `repeats` rounds in which they take turns, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-WARM_UP, repeats):
        for name, call in calls.items():
            spent = _milliseconds(call, device)
            if number >= 0:
                times[name].append(spent)
    return {name: statistics.median(of_call) for name, of_call in times.items()}


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
