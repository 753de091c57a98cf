"""Rewards computed by worker processes, with a time limit for each answer.

Workers are plain interpreters started with `subprocess`, not `multiprocessing.Process`: nothing is forked from a
process that holds threads or a CUDA context, and the caller's `__main__` is never imported again. Each stands under a
guard of its own (`rewards.guard`), with which all that a reward function has started ends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal

from eapo_megatron.rewards.extraction import Thinking
from eapo_megatron.rewards.guard import END
from eapo_megatron.rewards.mathematics import INCORRECT
from eapo_megatron.rewards.worker import REPORT_BYTES, Outcome, read_report
from eapo_megatron.stopping import STOP_SIGNALS

logger = logging.getLogger(__name__)

REWARDS = {"math": "eapo_megatron.rewards.mathematics:math_reward"}

_WORKER_PROGRAM = "from eapo_megatron.rewards.worker import main; main()"
_START_SECONDS = 120.0  # importing sympy from a cold network file system takes a while
_MAX_CHUNK = 64
_MAX_WARNINGS = 3  # of one error in one batch; the others are counted


@dataclass(frozen=True)
class RewardBatch:
    """Rewards in the order of the responses; `timeouts` and `crashes` count the answers without a verdict.

    Such an answer is wrong (-1) where the reward is "math", which it must not pay to bring down, and NaN where it is a
    user's function, whose values mean what that function says.
    """

    rewards: list[float]
    timeouts: int
    crashes: int


_Event = Outcome | Literal["expired", "exited"]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]  # its guard
    answers: Connection
    reports: socket.socket
    token: str  # on its reports, so that nothing else passes for one
    deadline: float
    ready: bool = False
    num_reports: int = 0
    chunk: deque[int] = field(default_factory=deque)  # indices of the answers it has been given and not yet scored

    def kill(self) -> None:
        # Said until it is heard: under nohup a guard that is still starting ignores it.
        while self.process.poll() is None:
            self.process.send_signal(END)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.1)
        self.answers.close()
        self.reports.close()


class RewardPool:
    """Scores responses in `num_workers` processes; a context manager, used by one thread at a time.

    reward: "math" (`math_reward`) or "package.module:function" with `function(response, answer) -> float`
    timeout_seconds: time for one answer; a worker that takes longer is killed and replaced
    thinking: where "math" looks for no answer (`extract_answer`)
    no_verdict: the reward of an answer without a verdict; None: as `RewardBatch` says

    An answer that runs out of time counts as a timeout; one whose reward raises, is no number of at most 1e6 in
    magnitude (`worker.MAX_REWARD`) or takes the process down counts as a crash. Neither has a verdict (see
    `RewardBatch`), and all other answers are scored regardless. What a reward function prints goes to stderr; what it
    starts ends with its worker. The workers end with the process that entered the pool, and on Linux with the thread
    that did, even when it is killed.

    Raises:
        ValueError: for settings out of range and, on entering, when the reward function cannot be loaded.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_seconds: float,
        reward: str = "math",
        thinking: Thinking = "auto",
        no_verdict: float | None = None,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds}")
        if reward not in REWARDS and not all(reward.partition(":")):
            raise ValueError(
                f'reward must be {" or ".join(sorted(REWARDS))}, or "package.module:function", got {reward!r}'
            )
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._reward = REWARDS.get(reward, reward)
        self._options = {"thinking": thinking} if reward in REWARDS else {}
        self._no_verdict = (INCORRECT if reward in REWARDS else math.nan) if no_verdict is None else no_verdict
        self._workers: list[_Worker] = []
        self.asks: tuple[str, ...] = ()  # what the function takes beside response and answer, once the pool is entered

    def __enter__(self) -> RewardPool:
        with self._killed_on_failure():
            for _ in range(self._num_workers):
                self._start_worker()
            while not all(worker.ready for worker in self._workers):
                for worker, event in self._events():
                    self._accept(worker, event)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill_workers()

    def score(
        self, responses: list[str], answers: list[Any], contexts: list[dict[str, Any]] | None = None
    ) -> RewardBatch:
        """Rewards of `responses` against `answers`, element by element, in their order.

        contexts: for each response what `asks` names, by these names; may be None when the function asks for nothing.

        Raises:
            ValueError: when the lists differ in length, or `contexts` are asked for and None.
            RuntimeError: outside of the pool's `with` block.
        """
        if len(responses) != len(answers):
            raise ValueError(f"answers must be as many as responses, got {len(answers)} for {len(responses)}")
        if contexts is None and self.asks:
            raise ValueError(f"reward {self._reward!r} asks for {', '.join(self.asks)}, which are not known here")
        if contexts is not None and len(contexts) != len(responses):
            raise ValueError(f"contexts must be as many as responses, got {len(contexts)} for {len(responses)}")
        if not self._workers:
            raise RuntimeError("RewardPool.score works only inside the `with` block of a pool that has not failed")
        with self._killed_on_failure():
            return self._score(responses, answers, contexts or [{}] * len(responses))

    def _score(self, responses: list[str], answers: list[Any], contexts: list[dict[str, Any]]) -> RewardBatch:
        rewards: dict[int, float] = {}
        timeouts = crashes = 0
        errors: Counter[str | None] = Counter()
        queue = deque(range(len(responses)))
        # Several chunks a worker: one slow chunk then leaves no other worker idle for long.
        chunk_size = max(1, min(_MAX_CHUNK, len(responses) // (4 * self._num_workers)))
        while len(rewards) < len(responses):
            for worker in [worker for worker in self._workers if worker.ready and not worker.chunk]:
                worker.chunk.extend(queue.popleft() for _ in range(min(chunk_size, len(queue))))
                if worker.chunk:
                    chunk = [
                        (responses[index], answers[index], {name: contexts[index][name] for name in self.asks})
                        for index in worker.chunk
                    ]
                    self._send(worker, chunk, queue)
            for worker, event in self._events():
                if not worker.ready:
                    self._accept(worker, event)
                    continue
                index = worker.chunk.popleft()
                reward, error, _ = event if isinstance(event, Outcome) else Outcome(None, f"its worker {event}")
                rewards[index] = self._no_verdict if reward is None else reward
                if reward is None:
                    timeouts += event == "expired"
                    crashes += event != "expired"
                    errors[error] += 1
                    if errors[error] <= _MAX_WARNINGS:
                        logger.warning("no reward for an answer to be compared with %.200r: %s", answers[index], error)
                if isinstance(event, Outcome):
                    worker.deadline = time.monotonic() + self._timeout_seconds
                else:
                    self._replace(worker, queue)
        for error, count in errors.items():
            if count > _MAX_WARNINGS:
                logger.warning("no reward for %d more answers: %s", count - _MAX_WARNINGS, error)
        return RewardBatch([rewards[index] for index in range(len(responses))], timeouts, crashes)

    def _send(self, worker: _Worker, answers: list[tuple[str, Any, dict[str, Any]]], queue: deque[int]) -> None:
        try:
            worker.answers.send(answers)
        except (BrokenPipeError, ConnectionResetError):  # it exited while idle: none of these answers is to blame
            self._replace(worker, queue)
        worker.deadline = time.monotonic() + self._timeout_seconds

    def _events(self) -> Iterator[tuple[_Worker, _Event]]:
        """What the workers report next, after waiting no longer than to the first deadline."""
        active = {worker.reports: worker for worker in self._workers if worker.chunk or not worker.ready}
        first_deadline = min(worker.deadline for worker in active.values())
        for reports in wait(list(active), timeout=max(0.0, first_deadline - time.monotonic())):
            worker = active[reports]  # type: ignore[index]
            event = _next_event(worker)
            if event is not None:
                del active[worker.reports]
                yield worker, event
        for worker in active.values():
            if time.monotonic() >= worker.deadline:
                yield worker, "expired"

    def _accept(self, worker: _Worker, event: _Event) -> None:
        """Take the first report of a starting worker."""
        if event == "expired":
            reason = f"that took longer than {_START_SECONDS:g} s"
        elif event == "exited":
            reason = "its process ended"
        elif event.error is not None:
            reason = event.error
        else:
            worker.ready = True
            self.asks = tuple(event.asks)
            return
        raise ValueError(f"reward {self._reward!r} cannot be loaded: {reason}")

    def _start_worker(self) -> None:
        their_answers, answers = Pipe(duplex=False)
        reports, their_reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = [their_answers.fileno(), their_reports.fileno()]
        # Schedulers signal every process of a job at its end: the last step's answers are still to be scored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WORKER_PROGRAM),
                *map(str, [*descriptors, os.getpid()]),
                *(self._reward, json.dumps(self._options)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=descriptors,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        token = secrets.token_hex()
        answers.send(token)
        their_answers.close()
        their_reports.close()
        self._workers.append(_Worker(process, answers, reports, token, deadline=time.monotonic() + _START_SECONDS))

    def _replace(self, worker: _Worker, queue: deque[int]) -> None:
        queue.extendleft(reversed(worker.chunk))
        self._workers.remove(worker)
        worker.kill()
        self._start_worker()

    def _kill_workers(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    @contextmanager
    def _killed_on_failure(self) -> Iterator[None]:
        """An interrupted batch leaves reports in the pipes that the next batch would take for its own."""
        try:
            yield
        except BaseException:
            self._kill_workers()
            raise


def _next_event(worker: _Worker) -> _Event | None:
    """The worker's next report; None for something else that its reward function wrote."""
    try:
        packet = worker.reports.recv(REPORT_BYTES)
    except ConnectionResetError:
        return "exited"
    if not packet:
        return "exited"
    outcome = read_report(packet, worker.token, worker.num_reports)
    worker.num_reports += outcome is not None
    return outcome


def check_reward(function: str) -> tuple[str, ...]:
    """Whether a recipe's `reward.function` can be loaded, tried in a worker process of its own ("math" needs none).

    Returns what it asks for beside response and answer: names among prompt, finished, length and record.

    Raises:
        ValueError: one sentence naming `reward.function`: an import that fails, hangs or crashes; a name that is no
            function of (response, answer).
    """
    if function in REWARDS:
        return ()
    try:
        with RewardPool(num_workers=1, timeout_seconds=1.0, reward=function) as pool:
            return pool.asks
    except ValueError as error:
        raise ValueError(f"reward.function: {error}") from error
