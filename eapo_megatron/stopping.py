"""How a process ends early: a run that is asked to stop, and a child whose parent is gone.

SIGUSR1 or SIGTERM to any rank, as schedulers send before the end, asks the run to stop: all ranks then finish their
step, save a checkpoint and exit EXIT_INTERRUPTED; the same command goes on from there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_INTERRUPTED = os.EX_TEMPFAIL  # 75: nothing is wrong, start it again

_PR_SET_PDEATHSIG = 1


class TrainingStoppedError(RuntimeError):
    """A run that cannot go on, found on all ranks alike; its last checkpoint is intact."""

    exit_code = 1


class InterruptedRunError(TrainingStoppedError):
    """A run that was asked to stop: all its steps are in its checkpoint, and the same command goes on from there."""

    exit_code = EXIT_INTERRUPTED


class StopRequest:
    """Whether this process has been asked to stop since this was made."""

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """In a new process: the signal `by` comes when the thread of process `parent` that started this one ends (Linux).

    Exits at once, with code 1, when the parent is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os._exit(1)
