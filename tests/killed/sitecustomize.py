"""On PYTHONPATH of a run: rank 0 is killed just before its n-th change of the file system below a folder.

KILL_BELOW: the folder. KILL_AT: n, or 0 to live and to append each change to KILL_LOG.
"""

from __future__ import annotations

import os
import shutil  # noqa: F401  # it asks os at its import which functions take dir_fd: before they are wrapped
import signal
from collections.abc import Callable
from typing import Any

_CHANGES = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "truncate")
_RANK = os.getpid()  # processes that a checkpoint forks to write its files count on, and end with their rank
_count = 0


def _place(what: Any, dir_fd: int | None = None) -> str:
    if isinstance(what, int):
        return os.readlink(f"/proc/self/fd/{what}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.abspath(os.path.join(folder, os.fspath(what)))


def _counted(name: str, change: Callable[..., Any], below: str, at: int) -> Callable[..., Any]:
    def changed(what: Any, *arguments: Any, **options: Any) -> Any:
        global _count
        place = _place(what, options.get("dir_fd"))
        if place.startswith(below):
            _count += 1
            if at == 0:
                with open(os.environ["KILL_LOG"], "a") as log:
                    log.write(f"{name} {place.removeprefix(below)}\n")
            elif _count == at:
                os.kill(_RANK, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return change(what, *arguments, **options)

    return changed


if "KILL_BELOW" in os.environ and os.environ.get("RANK") == "0":
    for _name in _CHANGES:
        setattr(os, _name, _counted(_name, getattr(os, _name), os.environ["KILL_BELOW"], int(os.environ["KILL_AT"])))
