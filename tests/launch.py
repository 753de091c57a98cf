"""Starts the ranks of a distributed test as plain processes, and ends them all with the test.

A launch costs seconds, so one goes through many cases. The scripts are in ranks/.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from eapo_megatron.launcher import free_port
from processes import start

TESTS = Path(__file__).parent


def run_ranks(
    script: Path, world_size: int, args: Sequence[str | Path] = (), *, timeout: float = 600.0, fresh: bool = False
) -> list[str]:
    """Runs `python script args` as ranks 0 to world_size - 1 of one process group -> the stdout of each.

    Args:
        fresh: nothing is imported before the script.

    Raises:
        AssertionError: with the stderr of the ranks that failed; the others are killed at once.
        TimeoutError: after `timeout` seconds, with the stderr of all.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = (str(script), [str(argument) for argument in args])
        environments = rank_environments(world_size, OMP_NUM_THREADS="1", PYTHONPATH=path)
        with started(_run_script, *arguments, environments=environments, folder=folder, fresh=fresh) as ranks:
            codes = first_codes(ranks, timeout)
        if failed := [rank for rank, code in enumerate(codes) if code]:
            raise AssertionError(f"ranks {failed} of {world_size} failed\n" + _errors(folder, failed))
        if None in codes:
            raise TimeoutError("ranks ran too long\n" + _errors(folder, range(world_size)))
        return [(folder / f"{rank}.out").read_text() for rank in range(world_size)]


def rank_environments(world_size: int, **settings: str) -> list[dict[str, str]]:
    """The environment of each rank of one process group, with these settings."""
    settings |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [os.environ | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


@contextmanager
def started(
    function: Callable[..., object],
    *args: Any,
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    fresh: bool = False,
) -> Iterator[list[BaseProcess]]:
    """Calls `function(*args)` in a process of each environment; they end with the block.

    Args:
        folder: where they write NUMBER.out and NUMBER.err.
        fresh: nothing is imported before.
    """
    processes: list[BaseProcess] = []
    try:
        for number, environment in enumerate(environments):
            processes.append(start(function, *args, environment=environment, said=folder / str(number), fresh=fresh))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def first_codes(processes: Sequence[BaseProcess], timeout: float) -> list[int | None]:
    """Their exit codes once one has failed, all are done or `timeout` seconds are over; None for one that runs."""
    deadline = time.monotonic() + timeout
    while None in (codes := [process.exitcode for process in processes]):
        left = deadline - time.monotonic()
        if any(codes) or left <= 0:
            break
        wait([process.sentinel for process, code in zip(processes, codes, strict=True) if code is None], left)
    return codes


def _run_script(script: str, args: list[str]) -> None:
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_cases(
    script: Path,
    world_size: int,
    args: Sequence[str | Path],
    out: Path,
    names: Sequence[str],
    *,
    timeout: float = 1800.0,
    fresh: bool = False,
) -> None:
    """Runs `python script args out names` on ranks that go through the cases of these names with `cases`.

    A case in which a rank fails or that hangs ends its launch: the ranks' stderr is kept for `result_of`, and the cases
    after it run in another launch.

    Raises:
        AssertionError: for ranks that fail before their first case.
        TimeoutError: for ranks that hang there.
    """
    left = list(names)
    while left:
        try:
            run_ranks(script, world_size, [*args, out, *left], timeout=timeout, fresh=fresh)
        except (AssertionError, TimeoutError) as error:
            begun = [name for name in left if _begun(out, name).exists()]
            if not begun:
                raise
            _error(out, begun[-1]).write_text(str(error))
            left = left[len(begun) :]
        else:
            left = []


def cases(out: Path, names: Sequence[str]) -> Iterator[str]:
    """The names one after another, for a rank; a case's results must be saved before any rank asks for the next."""
    for name in names:
        _begun(out, name).touch()
        yield name


def result_of(out: Path, name: str, *, part: str = "") -> Any:
    """What the ranks of a case saved as NAME.pt, or one of its parts: the same object at each call.

    Raises:
        AssertionError: with the ranks' stderr, when the case failed.
    """
    __tracebackhide__ = True
    if _error(out, name).exists():
        raise AssertionError(f"{name}: {_error(out, name).read_text()}")
    return _loaded(out / f"{name}{part}.pt")


@cache
def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def _begun(out: Path, name: str) -> Path:
    return out / f"{name}.begun"


def _error(out: Path, name: str) -> Path:
    return out / f"{name}.error"


def _errors(folder: Path, ranks: Sequence[int]) -> str:
    return "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.err').read_text()[-6000:]}" for rank in ranks)
