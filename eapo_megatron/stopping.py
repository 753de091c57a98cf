"""How a run is asked to stop early: SIGUSR1 or SIGTERM to any of its ranks, as schedulers send before the end.

All ranks then finish their step, save a checkpoint and exit EXIT_INTERRUPTED; the same command goes on from there.
"""

from __future__ import annotations

import os
import signal

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_INTERRUPTED = os.EX_TEMPFAIL  # 75: nothing is wrong, start it again


class StopRequest:
    """Whether this process has been asked to stop since this was made."""

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True
