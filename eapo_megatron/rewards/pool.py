"""Rewards computed by worker processes, with a time limit for each answer.

Workers are plain interpreters started with `subprocess`, not `multiprocessing.Process`: nothing is forked from a
process that holds threads or a CUDA context, and the caller's `__main__` is never imported again.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal

from eapo_megatron.rewards.mathematics import INCORRECT
from eapo_megatron.rewards.worker import Outcome
from eapo_megatron.stopping import STOP_SIGNALS

logger = logging.getLogger(__name__)

REWARDS = {"math": "eapo_megatron.rewards.mathematics:math_reward"}

_WORKER_PROGRAM = "from eapo_megatron.rewards.worker import main; main()"
_START_SECONDS = 120.0  # importing sympy from a cold network file system takes a while
_MAX_CHUNK = 64


@dataclass(frozen=True)
class RewardBatch:
    """Rewards in the order of the responses; `timeouts` and `crashes` count the -1s given for want of a verdict."""

    rewards: list[float]
    timeouts: int
    crashes: int


_Event = Outcome | Literal["expired", "exited"]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    ready: bool = False
    chunk: deque[int] = field(default_factory=deque)  # indices of the answers it has been given and not yet scored

    def kill(self) -> None:
        # It leads a process group of its own: what the reward function started goes with it.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class RewardPool:
    """Scores responses in `num_workers` processes; a context manager, used by one thread at a time.

    reward: "math" (`math_reward`) or "package.module:function" with `function(response, answer) -> float`
    timeout_seconds: time for one answer; a worker that takes longer is killed and replaced

    An answer that runs out of time scores -1 and counts as a timeout. One whose reward raises, is not a finite number
    or takes the process down scores -1 and counts as a crash. All other answers are scored regardless. The workers
    end with the process that entered the pool, and on Linux with the thread that did, even when it is killed.

    Raises ValueError for settings out of range and, on entering, when the reward function cannot be loaded.
    """

    def __init__(self, *, num_workers: int, timeout_seconds: float, reward: str = "math") -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds}")
        if reward not in REWARDS and not all(reward.partition(":")):
            raise ValueError(f'reward must be one of {sorted(REWARDS)} or "package.module:function", got {reward!r}')
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._reward = REWARDS.get(reward, reward)
        self._workers: list[_Worker] = []

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

    def score(self, responses: list[str], answers: list[Any]) -> RewardBatch:
        """Rewards of `responses` against `answers`, element by element, in their order.

        Raises ValueError when the lists differ in length, RuntimeError outside of the pool's `with` block.
        """
        if len(responses) != len(answers):
            raise ValueError(f"answers must be as many as responses, got {len(answers)} for {len(responses)}")
        if not self._workers:
            raise RuntimeError("RewardPool.score works only inside the `with` block of a pool that has not failed")
        with self._killed_on_failure():
            return self._score(responses, answers)

    def _score(self, responses: list[str], answers: list[Any]) -> RewardBatch:
        rewards: dict[int, float] = {}
        timeouts = crashes = 0
        queue = deque(range(len(responses)))
        # Several chunks a worker: one slow chunk then leaves no other worker idle for long.
        chunk_size = max(1, min(_MAX_CHUNK, len(responses) // (4 * self._num_workers)))
        while len(rewards) < len(responses):
            for worker in [worker for worker in self._workers if worker.ready and not worker.chunk]:
                worker.chunk.extend(queue.popleft() for _ in range(min(chunk_size, len(queue))))
                if worker.chunk:
                    self._send(worker, [(responses[index], answers[index]) for index in worker.chunk], queue)
            for worker, event in self._events():
                if not worker.ready:
                    self._accept(worker, event)
                    continue
                index = worker.chunk.popleft()
                reward, error = event if isinstance(event, Outcome) else (None, f"its worker {event}")
                rewards[index] = INCORRECT if reward is None else reward
                if reward is None:
                    timeouts += event == "expired"
                    crashes += event != "expired"
                    logger.warning("no reward for an answer to be compared with %r: %s", answers[index], error)
                if isinstance(event, Outcome):
                    worker.deadline = time.monotonic() + self._timeout_seconds
                else:
                    self._replace(worker, queue)
        return RewardBatch([rewards[index] for index in range(len(responses))], timeouts, crashes)

    def _send(self, worker: _Worker, answers: list[tuple[str, Any]], queue: deque[int]) -> None:
        try:
            worker.connection.send(answers)
        except (BrokenPipeError, ConnectionResetError):  # it exited while idle: none of these answers is to blame
            self._replace(worker, queue)
        worker.deadline = time.monotonic() + self._timeout_seconds

    def _events(self) -> Iterator[tuple[_Worker, _Event]]:
        """What the workers report next: at least one event, after waiting no longer than to the first deadline."""
        active = {worker.connection: worker for worker in self._workers if worker.chunk or not worker.ready}
        first_deadline = min(worker.deadline for worker in active.values())
        for connection in wait(list(active), timeout=max(0.0, first_deadline - time.monotonic())):
            worker = active.pop(connection)  # type: ignore[arg-type]
            try:
                event: _Event = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                event = "exited"
            yield worker, event
        for worker in active.values():
            if time.monotonic() >= worker.deadline:
                yield worker, "expired"

    def _accept(self, worker: _Worker, event: _Event) -> None:
        """Take the first report of a starting worker."""
        if not isinstance(event, Outcome):
            raise RuntimeError(f"a reward worker {event} while it was starting; its own messages are on stderr")
        if event.error is not None:
            raise ValueError(f"reward {self._reward!r} cannot be loaded: {event.error}")
        worker.ready = True

    def _start_worker(self) -> None:
        ours, theirs = Pipe()
        # Schedulers signal every process of a job at its end: the last step's answers are still to be scored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_PROGRAM, str(theirs.fileno()), self._reward],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._workers.append(_Worker(process, ours, deadline=time.monotonic() + _START_SECONDS))

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
