"""What benchmarks of single functions share: time, memory and collectives of a call, and the machine it ran on."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile


def peak_and_collectives(call: Callable[[], Any], *, beside_results: bool = False) -> tuple[Any, int, int]:
    """What call returns, the most bytes it held at once beyond those before it, and the collectives it started.

    `beside_results` leaves the tensors that it returns out of the bytes: the last allocations of their sizes.
    """
    result, allocations, events = profiled(call)
    for tensor in result if beside_results else ():
        last = len(allocations) - 1 - allocations[::-1].index(tensor.untyped_storage().nbytes())
        allocations[last] = 0
    collectives = sum(event.startswith("c10d::") for event in events)
    return result, max(accumulate(allocations), default=0), collectives


def profiled(call: Callable[[], Any]) -> tuple[Any, list[int], list[str]]:
    """What call returns, the bytes of each of its allocations on the CPU (negative: set free), all events' names."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocations = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, allocations, [event.name() for event in events]


def holding(call: Callable[[], Any]) -> tuple[Any, dict[int, int]]:
    """What call returns, and the bytes of each storage that it saves for backward, by address."""
    held: dict[int, int] = {}

    def count(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        return call(), held


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time until the slowest rank is done."""
    dist.barrier()
    start = time.perf_counter()
    result = call()
    dist.barrier()
    return 1e3 * (time.perf_counter() - start), result


def circumstances() -> dict[str, Any]:
    """Date, machine and load for a record."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "torch": torch.__version__},
        # More than the ranks: other work shared the cores, and only the ratios mean something.
        "load_average": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
