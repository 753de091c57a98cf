"""Drives `eapo-megatron train` as a user does, and stops it as the world does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from eapo_megatron import failures
from eapo_megatron.cli import main
from eapo_megatron.recipe_files import load_recipe
from launch import first_codes, rank_environments, started


def command(recipe: Path, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "eapo_megatron.cli", "train", str(recipe), *overrides]


def train(recipe: Path, *overrides: str, expect: int = 0, timeout: float = 600) -> str:
    """Runs to the end -> stderr."""
    done = subprocess.run(
        command(recipe, overrides), env=_as_user(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stderr


def train_ranks(recipe: Path, *overrides: str, expect: int = 0, **of_command: Any) -> str:
    """Runs the ranks that `train` would start, in processes that need not import anything first -> stderr.

    Options are those of `run_command`.
    """
    world_size = load_recipe(recipe, overrides).cluster.world_size
    done = run_command(["train", recipe, *overrides], world_size, **of_command)
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stderr


def run_command(
    arguments: Sequence[str | Path],
    ranks: int = 0,
    *,
    first: Callable[[], object] | None = None,
    timeout: float = 600,
    **settings: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `eapo-megatron ARGUMENTS` in processes that need not import anything first -> what they said.

    Args:
        ranks: as so many ranks of one launch; 0: as the process that a user starts.
        first: called in each process before the command.
        settings: of their environment.

    Returns:
        The exit code is that of the first rank that failed, 128 + N for one ended by signal N; the others are killed.

    Raises:
        TimeoutError: after `timeout` seconds, with the stderr of all.
    """
    environments = rank_environments(ranks, **settings) if ranks else [_as_user() | settings]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = [str(argument) for argument in arguments]
        with started(_command_line, line, first, environments=environments, folder=folder) as processes:
            codes = first_codes(processes, timeout)
        out, err = ("".join(path.read_text() for path in sorted(folder.glob(f"*.{kind}"))) for kind in ("out", "err"))
    if None in codes and not any(codes):
        raise TimeoutError(err)
    code = next(filter(None, codes), 0)
    return subprocess.CompletedProcess(line, code if code >= 0 else 128 - code, out, err)


def _as_user() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}


def _command_line(arguments: list[str], first: Callable[[], object] | None) -> None:
    sys.argv[1:] = arguments
    failures.STARTED = time.time()  # as its import would set it
    if first is not None:
        first()
    main()


def train_until(
    recipe: Path, *overrides: str, until: Callable[[], bool], send: signal.Signals, to: str, timeout: float = 600
) -> int:
    """Runs until `until()`, then sends a signal to the "launcher" or its "last rank" -> the exit code.

    All its processes are gone afterwards.
    """
    process = subprocess.Popen(command(recipe, overrides), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + timeout
        while not until():
            assert process.poll() is None, "the run ended before it was to be stopped"
            assert time.monotonic() < deadline, "the run took too long"
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in family if "eapo_megatron.cli" in child.cmdline()]
        os.kill(process.pid if to == "launcher" else ranks[-1].pid, send)
        code = process.wait(timeout)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
        return code
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def metrics(run_folder: Path, first_step: int = 0) -> list[dict[str, Any]]:
    """metrics.jsonl from `first_step` on, without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds/", "tokens_per_second", "memory/")
    return [
        {name: value for name, value in line.items() if not name.startswith(measured)}
        for line in lines
        if line["step"] >= first_step
    ]


def last_step(run_folder: Path) -> int:
    """The last step in metrics.jsonl; 0 before there is one."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(run_folder: Path) -> list[int]:
    """The steps of a run's whole checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_folder / "checkpoints").glob("step_*"))


def tensors(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint by its name."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint, scratch)
    loaded = torch.load(scratch, weights_only=False)
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
