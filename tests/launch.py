"""Starts the ranks of a distributed test as plain processes, and ends them all with the test."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1


def run_ranks(script: Path, world_size: int, args: Sequence[str | Path] = (), *, timeout: float = 300.0) -> list[str]:
    """Runs `python script args` as ranks 0 to world_size - 1 of one process group -> the stdout of each.

    Raises:
        AssertionError: with the stderr of the ranks that failed; the others are killed at once.
        TimeoutError: after `timeout` seconds, with the stderr of all.
    """
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
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


def _wait(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    """Until all ranks are done."""
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks):
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
