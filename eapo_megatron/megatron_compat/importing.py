"""megatron-core's import, seconds at the start of every rank, in half its time on machines without a GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch

from eapo_megatron.megatron_compat.replacing import Replacement, instead, replaced


def uncompiled(function: Callable) -> Callable:
    """In place of `torch.compile`: the function as it is."""
    return function


IMPORTED_UNCOMPILED = (
    Replacement(
        torch,
        "compile",
        instead(uncompiled),
        why="Importing megatron-core wraps functions, and so loads the compiler. No policy here calls one of them.",
        until="torch.compile loads its compiler at a function's first call",
    ),
)


def import_megatron() -> None:
    """Imports megatron-core: the garbage collector rests, since modules stay, and without a GPU nothing is compiled."""
    if "megatron.core" in sys.modules:
        return
    gc.disable()
    try:
        with nullcontext() if torch.cuda.is_available() else replaced(IMPORTED_UNCOMPILED):
            import megatron.core  # noqa: F401
    finally:
        gc.enable()
