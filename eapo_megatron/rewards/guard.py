"""A reward worker's guard: the process above the one that runs reward functions, and the end of all that those start.

What a reward function starts may leave its process group and its session, but not its guard: orphans come back to the
guard (Linux's child subreaper), which kills every descendant before it ends. It runs no code of the reward function,
so it answers even when the worker hangs, and it outlives a pool that was killed by as long as this takes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from eapo_megatron.stopping import STOP_SIGNALS, end_with_parent

END = signal.SIGHUP  # what the pool, or the kernel when the pool is gone, tells a guard

_PR_SET_CHILD_SUBREAPER = 36


def fork_worker(pool: int, descriptors: Sequence[int]) -> None:
    """Splits this process, started by process `pool`, in two: returns in the worker, and never in its guard.

    The guard ends, after all its descendants, when the worker does or on END, which also comes when the pool is gone.
    `descriptors` are the worker's alone.
    """
    # Waited for, not handled. The job's stop signals are not for guards: SIGTERM to a whole job must not end them.
    signal.pthread_sigmask(signal.SIG_BLOCK, [END, signal.SIGCHLD, *STOP_SIGNALS])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would never be waited for
    signal.signal(END, signal.SIG_DFL)  # ignored under nohup
    end_with_parent(pool, by=END)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.setsid()  # a signal to the worker's own process group must not reach the guard
        end_with_parent(guard)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [END, signal.SIGCHLD])
        return
    for descriptor in descriptors:
        os.close(descriptor)
    while worker not in _ended_children() and signal.sigwait([END, signal.SIGCHLD]) != END:
        pass
    _end_descendants()
    os._exit(0)


def _ended_children() -> set[int]:
    ended = set()
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    return ended


def _end_descendants() -> None:
    """Again and again: what is killed may have started another just before."""
    while descendants := psutil.Process().children(recursive=True):
        for descendant in descendants:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
        time.sleep(0.001)
        _ended_children()
