"""Processes of tests that begin with this package imported: forked from one that has imported it and nothing more.

To import torch, Megatron and the package takes longer than most of what a test asks of a process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks whether there are GPUs without opening one before the fork
FORKED, FRESH = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
# What a rank of `train` and one of `evaluate` import.
FORKED.set_forkserver_preload(
    [
        "eapo_megatron.cli",
        "eapo_megatron.training.preflight",
        "eapo_megatron.training.session",
        "eapo_megatron.training.loop",
        "eapo_megatron.evaluation.answers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_utils_tokenizers",
    ]
)


def start(
    function: Callable[..., object],
    *args: Any,
    environment: Mapping[str, str],
    said: Path,
    fresh: bool = False,
) -> BaseProcess:
    """Starts `function(*args)` in a process of this environment.

    Args:
        said: it writes to this path with the ending .out, and .err.
        fresh: Python starts anew, with nothing imported.
    """
    files = [said.with_name(f"{said.name}.{kind}") for kind in ("out", "err")]
    for file in files:
        file.touch()
    process = (FRESH if fresh else FORKED).Process(target=_run, args=(function, args, dict(environment), files))
    process.start()
    return process


def on_ranks(function: Callable[..., object], *args: Any, size: int) -> None:
    """Calls `function(rank, *args)` in `size` processes at once.

    Raises:
        Exception: with the traceback of the first that fails; the others are ended.
    """
    import torch.multiprocessing  # seconds, which a process that starts afresh need not spend on it

    torch.multiprocessing.start_processes(function, args, nprocs=size, start_method="forkserver")


def _run(function: Callable[..., object], args: tuple, environment: dict[str, str], files: list[Path]) -> None:
    gc.freeze()  # collections, Megatron asks for many, need not search what is imported
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    function(*args)


def die_with_parent() -> None:
    """This process ends with the one that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
