"""Local ranks: a bare `eapo-megatron train` starts one process a rank on this machine and ends with all of them.

Under torchrun or srun nothing is started: the ranks are there already, named by RANK and WORLD_SIZE or SLURM_PROCID.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.failures import print_error
from eapo_megatron.stopping import EXIT_INTERRUPTED, STOP_SIGNALS, end_with_parent


def rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process that torchrun or srun started, else None.

    Raises:
        RecipeError: naming the variable that is missing or wrong.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if len(given) == 1:
        raise RecipeError(
            f"{given[0]} is set without {'WORLD_SIZE' if 'RANK' in given else 'RANK'}: launchers set both, "
            "a bare `eapo-megatron train` needs neither"
        )
    if given:
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local": "LOCAL_RANK"}
    elif _number(environment, "SLURM_NTASKS", default="1") > 1 and "SLURM_PROCID" in environment:
        names = {"rank": "SLURM_PROCID", "world": "SLURM_NTASKS", "local": "SLURM_LOCALID"}
    else:
        return None
    world = _number(environment, names["world"], low=1)
    rank = _number(environment, names["rank"], high=world - 1)
    local = _number(environment, names["local"], high=world - 1)
    if not environment.get("MASTER_ADDR"):
        raise RecipeError("MASTER_ADDR must name the first node: srun does not set it")
    port = _number(environment, "MASTER_PORT", low=1, high=65_535, default=None if given else "29500")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": environment["MASTER_ADDR"],
        "MASTER_PORT": str(port),
    }


def _number(
    environment: Mapping[str, str], name: str, *, low: int = 0, high: int = 2**31 - 1, default: str | None = None
) -> int:
    text = environment.get(name, default)
    if text is None:
        raise RecipeError(f"{name} is not set: launchers set it for every rank")
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise RecipeError(f"{name} must be a whole number from {low} to {high}, got {text[:20]!r}")
    return int(text)


def check_devices(recipe: Recipe, local_rank: int | None = None) -> None:
    """Whether this machine has what the recipe computes on: for all its local ranks, or for the one of `local_rank`.

    Raises:
        RecipeError: naming the key.
    """
    import torch  # seconds

    cluster = recipe.cluster
    on_gpu = cluster.device == "cuda" or (cluster.device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        if recipe.model.head.backend == "triton":
            raise RecipeError(
                f"model.head.backend triton needs a GPU, and cluster.device {cluster.device} is the CPU here"
            )
        if recipe.model.attention_backend == "flex":
            raise RecipeError(
                "model.attention_backend flex has no backward on the CPU, which cluster.device "
                f"{cluster.device} is here: leave it auto"
            )
        return
    by_pieces = recipe.train.packing == "segments" and recipe.model.attention_backend == "torch"
    if by_pieces and recipe.model.dtype == "float32":
        raise RecipeError(
            "model.attention_backend torch has no kernel for model.dtype float32 on GPUs with train.packing segments: "
            "leave it auto"
        )
    if not torch.cuda.is_available():
        raise RecipeError("cluster.device cuda: PyTorch sees no GPU on this machine")
    visible, asked = torch.cuda.device_count(), cluster.gpus_per_node if local_rank is None else local_rank + 1
    if asked > visible:
        what = f"cluster.gpus_per_node {asked}" if local_rank is None else f"LOCAL_RANK {local_rank}"
        raise RecipeError(f"{what}: PyTorch sees {visible} GPUs on this machine")
    if local_rank is None or recipe.model.dtype != "bfloat16":  # the launching process opens no GPU
        return
    if torch.cuda.get_device_capability(local_rank) < (8, 0):
        raise RecipeError(f"model.dtype bfloat16 is not supported by {torch.cuda.get_device_name(local_rank)}")


def run_local_ranks(world_size: int, arguments: Sequence[str]) -> int:
    """Runs `eapo-megatron ARGUMENTS` in `world_size` processes -> the first failure's exit code, or 0.

    When one rank fails the others are ended; when this process dies, even by SIGKILL, all of them do. Requests to
    stop are passed on to the ranks; Ctrl-C is for this process, which ends them.
    """
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = max(1, (os.cpu_count() or 1) // world_size)
    parent = os.getpid()

    def start_rank() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent(parent)

    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "eapo_megatron.cli", *arguments],
            env={"OMP_NUM_THREADS": str(threads)}
            | dict(os.environ)
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=start_rank,
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
        for rank, code in enumerate(codes):
            if code and code != EXIT_INTERRUPTED:
                if code < 0:  # it could not say so itself: out of memory, most often
                    print_error(f"rank {rank} was ended by {signal.Signals(-code).name}")
                return code if code > 0 else 128 - code
        if None not in codes:
            return max(code for code in codes if code is not None)
        time.sleep(0.05)


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that Linux gives to outgoing connections."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
