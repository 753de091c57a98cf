"""The last resort: an exception that nothing foresaw becomes one line for the user and a log with its traceback.

Of the ranks that fail together one speaks: the first to write its log since this process started.
"""

from __future__ import annotations

import fcntl
import sys
import tempfile
import time
import traceback
from pathlib import Path

from eapo_megatron.config import RecipeError

STARTED = time.time()
_LONGEST = 300  # characters of what an unforeseen exception says


def report_failure(error: BaseException, folder: Path | None = None, *, rank: int = 0) -> None:
    """Logs the traceback in `folder`/rank-R.log and prints `error: WHAT (traceback in LOG)`, if no other rank has.

    The log is a temporary file where there is no folder, or none can be written, which may be what failed.
    """
    words = described(error, folder and folder.parent)
    trace = "".join(traceback.format_exception(error))
    try:
        if folder is None:
            raise FileNotFoundError("no run folder")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_first = all(log.stat().st_mtime < STARTED for log in folder.glob("rank-*.log"))
            log = folder / f"rank-{rank}.log"
            log.write_text(trace, encoding="utf-8")
            if is_first:
                print_error(f"{words} (traceback in {log})")
    except OSError:
        print_error(f"{words}{_temporary_log(trace)}")


def described(error: BaseException, where: Path | None = None) -> str:
    """An exception in words: the system's own with their path or `where`, others with the name of their class."""
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, OSError):
        path = where if error.filename is None else error.filename
        return f"{path}: {error.strerror}" if path is not None and error.strerror else error.strerror or str(error)
    words = str(error)
    return f"{type(error).__name__}: {words if len(words) <= _LONGEST else words[:_LONGEST] + '...'}"


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _temporary_log(trace: str) -> str:
    try:
        with tempfile.NamedTemporaryFile("w", prefix="eapo_megatron-", suffix=".log", delete=False) as file:
            file.write(trace)
    except OSError:
        return ""
    return f" (traceback in {file.name})"
