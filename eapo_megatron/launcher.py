"""Local ranks: a bare `eapo-megatron train` starts one process a rank on this machine and ends with all of them.

Under torchrun or srun nothing is started: the ranks are there already, named by RANK and WORLD_SIZE or SLURM_PROCID.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from eapo_megatron.config import RecipeError
from eapo_megatron.stopping import EXIT_INTERRUPTED, STOP_SIGNALS, end_with_parent


def rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process that torchrun or srun started, else None.

    Raises:
        RecipeError: under srun without MASTER_ADDR.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        if "MASTER_ADDR" not in environment:
            raise RecipeError("MASTER_ADDR must name the first node: srun does not set it")
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_PORT": environment.get("MASTER_PORT", "29500"),
        }
    return None


def run_local_ranks(world_size: int, arguments: Sequence[str]) -> int:
    """Runs `eapo-megatron ARGUMENTS` in `world_size` processes -> the first failure's exit code, or 0.

    When one rank fails the others are ended; when this process dies, even by SIGKILL, all of them do. Requests to
    stop are passed on to the ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = max(1, (os.cpu_count() or 1) // world_size)
    parent = os.getpid()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "eapo_megatron.cli", *arguments],
            env={"OMP_NUM_THREADS": str(threads)}
            | dict(os.environ)
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=lambda: end_with_parent(parent),
        )
        for rank in range(world_size)
    ]

    def pass_on(number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, pass_on)
    try:
        return _exit_code(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _exit_code(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for the first failure, or for all: interrupted ranks have agreed on it."""
    while True:
        codes = [rank.poll() for rank in ranks]
        for code in codes:
            if code and code != EXIT_INTERRUPTED:
                return code if code > 0 else 128 - code
        if None not in codes:
            return max(code for code in codes if code is not None)
        time.sleep(0.05)
