"""A rank that is killed just before its n-th change of the file system below a folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

_CHANGES = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "truncate")
_count = 0


def kill_rank_0(below: str, at: int, log: str) -> None:
    """In rank 0 of a run, before it: kills it at change `at`, or at 0 appends each change to the file `log`.

    Processes that a checkpoint forks to write its files count on, and end with their rank.
    """
    if os.environ["RANK"] == "0":
        for name in _CHANGES:
            setattr(os, name, _counted(name, getattr(os, name), below, at, log, os.getpid()))


def _place(what: Any, dir_fd: int | None = None) -> str:
    if isinstance(what, int):
        return os.readlink(f"/proc/self/fd/{what}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.abspath(os.path.join(folder, os.fspath(what)))


def _counted(name: str, change: Callable[..., Any], below: str, at: int, log: str, rank: int) -> Callable[..., Any]:
    def changed(what: Any, *arguments: Any, **options: Any) -> Any:
        global _count
        place = _place(what, options.get("dir_fd"))
        if place.startswith(below):
            _count += 1
            if at == 0:
                with open(log, "a") as changes:
                    changes.write(f"{name} {place.removeprefix(below)}\n")
            elif _count == at:
                os.kill(rank, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return change(what, *arguments, **options)

    return changed
