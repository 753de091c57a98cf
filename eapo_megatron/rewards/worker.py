"""The process that scores answers for `RewardPool`.

Its arguments: the file descriptors of answers and reports, the pool's process id, a "module:function", and that
function's options as JSON. From the first it reads a token, then lists of (response, answer, what else the function
asks for by name); to the second it writes one report for each answer, as soon as it is known, so that the pool can tell
which answer it is at work on. Report 0 says that the function is loaded and what it asks for, report n is that of the
n-th answer.

Reports are packets of a socket, and each bears the token and its number: what else a reward function writes there is
recognised and ignored, and never runs into a report.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from eapo_megatron.rewards.guard import fork_worker

# Far beyond any sensible reward; sums of squares of what is larger lose the other rewards of a group, or overflow.
MAX_REWARD = 1e6
REPORT_BYTES = 65536
# What a function gets beside response and answer, when a parameter of it has this name.
CONTEXT = ("prompt", "finished", "length", "record")

_ERROR_CHARACTERS = 200


class Outcome(NamedTuple):
    """What came of one answer: the reward, or one sentence on why there is none; of report 0 what is asked for."""

    reward: float | None
    error: str | None = None
    asks: Sequence[str] = ()  # names of CONTEXT

    def report(self, token: str, number: int) -> bytes:
        return json.dumps([token, number, *self]).encode()


def read_report(packet: bytes, token: str, number: int) -> Outcome | None:
    """The outcome that `packet` reports under `token` and `number`; None when it is anything else."""
    try:
        report = json.loads(packet)
    except ValueError:
        return None
    if isinstance(report, list) and report[:2] == [token, number]:
        return Outcome(*report[2:])
    return None


def main() -> None:
    answers_fd, reports_fd, pool = (int(argument) for argument in sys.argv[1:4])
    reward_path, options = sys.argv[4], json.loads(sys.argv[5])
    fork_worker(pool, [answers_fd, reports_fd])
    # It was started with the job's stop signals blocked. SIGTERM is let through again, to no effect here, for what a
    # reward function starts and has to end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    for descriptor in (answers_fd, reports_fd):
        os.set_inheritable(descriptor, False)
    answers, reports = Connection(answers_fd, writable=False), socket.socket(fileno=reports_fd)
    worker = os.getpid()
    token, number = answers.recv(), 0
    try:
        reward, asks = _load(reward_path, options)
    except Exception as error:
        reports.send(Outcome(None, _one_line(error)).report(token, number))
        return
    reports.send(Outcome(0.0, asks=asks).report(token, number))
    while True:
        try:
            chunk = answers.recv()
        except EOFError:
            return
        for response, answer, context in chunk:
            number += 1
            outcome = _score(reward, response, answer, context)
            if os.getpid() != worker:  # a fork that the reward function has let out
                os._exit(1)
            reports.send(outcome.report(token, number))


def _load(path: str, options: dict[str, Any]) -> tuple[Callable[..., float], list[str]]:
    """The function with its options, and the names of CONTEXT that it asks for."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not callable but {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not tell
        return partial(function, **options), []
    asks = _asked(signature)
    try:
        signature.bind("response", "answer", **options, **dict.fromkeys(asks))
    except TypeError as error:
        raise TypeError(f"it must take (response, answer), but {name}{signature} does not: {error}") from error
    return partial(function, **options), asks


def _asked(signature: inspect.Signature) -> list[str]:
    """The parameters named as something of CONTEXT, those that take response and answer aside."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(signature.parameters.values())
    taken = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY][:2]
    return [one.name for one in parameters if one.name in CONTEXT and one.kind in kinds and one not in taken]


def _score(reward: Callable[..., float], response: str, answer: object, context: dict[str, Any]) -> Outcome:
    try:
        value = float(reward(response, answer, **context))
    except Exception as error:
        return Outcome(None, _one_line(error))
    if not math.isfinite(value):
        return Outcome(None, f"the reward is {value}, not a finite number")
    if abs(value) > MAX_REWARD:
        return Outcome(None, f"the reward is {value:g}, beyond {MAX_REWARD:g} in magnitude")
    return Outcome(value)


def _one_line(error: Exception) -> str:
    """The error's type and the beginning of its text."""
    text = " ".join(str(error)[: 10 * _ERROR_CHARACTERS].split())
    if len(text) > _ERROR_CHARACTERS:
        text = text[:_ERROR_CHARACTERS] + " ..."
    return f"{type(error).__name__}: {text}"
