"""The process that scores answers for `RewardPool`; its arguments are a file descriptor and a "module:function".

It reads lists of (response, answer) from the connection on `descriptor` and writes one `Outcome` for each, as soon as
it is known, so that the pool can tell which answer it is at work on. The first `Outcome` says that it is ready.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1


class Outcome(NamedTuple):
    """What came of one answer: the reward, or one sentence on why there is none."""

    reward: float | None
    error: str | None = None


def main() -> None:
    descriptor, reward_path = int(sys.argv[1]), sys.argv[2]
    # A worker stuck in a computation never notices that its pool is gone; the kernel does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It was started with the job's stop signals blocked. SIGTERM is let through again, to no effect here, for what a
    # reward function starts and has to end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        reward = _load(reward_path)
    except Exception as error:
        connection.send(Outcome(None, f"{type(error).__name__}: {error}"))
        return
    connection.send(Outcome(0.0))
    while True:
        try:
            answers = connection.recv()
        except EOFError:
            return
        for response, answer in answers:
            connection.send(_score(reward, response, answer))


def _load(path: str) -> Callable[..., float]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


def _score(reward: Callable[..., float], response: str, answer: object) -> Outcome:
    try:
        value = float(reward(response, answer))
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    return Outcome(value) if math.isfinite(value) else Outcome(None, f"the reward is {value}, not a finite number")
