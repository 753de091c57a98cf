"""Starts the ranks of a distributed test as plain processes, and ends them all with the test.

A launch costs seconds, so one goes through many cases. The scripts are in ranks/.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

PR_SET_PDEATHSIG = 1
TESTS = Path(__file__).parent


def run_ranks(script: Path, world_size: int, args: Sequence[str | Path] = (), *, timeout: float = 600.0) -> list[str]:
    """Runs `python script args` as ranks 0 to world_size - 1 of one process group -> the stdout of each.

    Raises:
        AssertionError: with the stderr of the ranks that failed; the others are killed at once.
        TimeoutError: after `timeout` seconds, with the stderr of all.
    """
    shared = {
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": 1,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[subprocess.Popen] = []
        try:
            for rank in range(world_size):
                with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
                    own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, str(script), *map(str, args)],
                            env=os.environ | {key: str(value) for key, value in own.items()},
                            stdout=out,
                            stderr=err,
                            preexec_fn=_die_with_parent,
                        )
                    )
            _wait(ranks, folder, time.monotonic() + timeout)
            return [(folder / f"{rank}.out").read_text() for rank in range(world_size)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def run_cases(
    script: Path,
    world_size: int,
    args: Sequence[str | Path],
    out: Path,
    names: Sequence[str],
    *,
    timeout: float = 1800.0,
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
            run_ranks(script, world_size, [*args, out, *left], timeout=timeout)
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
    """What the ranks of a case saved as NAME.pt, or one of its parts.

    Raises:
        AssertionError: with the ranks' stderr, when the case failed.
    """
    __tracebackhide__ = True
    if _error(out, name).exists():
        raise AssertionError(f"{name}: {_error(out, name).read_text()}")
    return torch.load(out / f"{name}{part}.pt", weights_only=False)


def _begun(out: Path, name: str) -> Path:
    return out / f"{name}.begun"


def _error(out: Path, name: str) -> Path:
    return out / f"{name}.error"


def _wait(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    """Until all ranks are done."""
    while None in (codes := [process.poll() for process in ranks]):
        if any(codes):
            break
        if time.monotonic() > deadline:
            raise TimeoutError("ranks ran too long\n" + _errors(folder, range(len(ranks))))
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.returncode]
    if failed:
        raise AssertionError(f"ranks {failed} of {len(ranks)} failed\n" + _errors(folder, failed))


def _errors(folder: Path, ranks: Sequence[int]) -> str:
    return "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.err').read_text()[-6000:]}" for rank in ranks)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
