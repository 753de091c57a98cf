"""Where the rollouts of a step come from: sampled when they are asked for, or ahead of it while the policy trains.

Prompts are drawn in the order of training in rounds of `train.num_prompts_per_step`, and rounds are used in that order,
so a position says all of what was used. With `rollout.max_staleness` n up to n rounds after the one that is asked for
are sampled ahead. Every step uses one round at least, so none is used more than n weight updates after it was begun.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from typing import Protocol, cast

import torch
from torch import Tensor

from eapo_megatron.config import Recipe
from eapo_megatron.data import PromptSet
from eapo_megatron.policy.responses import Responses
from eapo_megatron.rollout.engine import AsynchronousEngine, EngineLostError
from eapo_megatron.rollout.rollouts import Draw, Rollouts, Sampler, training_draw


class Producer(Protocol):
    """Gives rounds of rollouts; every rank calls it together."""

    def round(self, position: int, *, ahead: int) -> Rollouts:
        """The round that begins with prompt `position` of the order of training.

        Up to `ahead` rounds after it may be begun meanwhile, to be sampled while the policy trains.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Idle shares since the last call."""
        ...

    def close(self) -> None:
        """Drops what is being sampled."""
        ...


class Synchronous:
    """Samples a round when it is asked for."""

    def __init__(self, sampler: Sampler, draw: Callable[[int], Draw]) -> None:
        self._sampler = sampler
        self._draw = draw

    def round(self, position: int, *, ahead: int) -> Rollouts:
        """Nothing is sampled ahead."""
        return self._sampler.sample(self._draw(position))

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is being sampled."""


@dataclass
class _Begun:
    """A round that is being sampled, by the leaders of the replicas."""

    position: int
    part: Future[tuple[Responses, Tensor]] | None  # this leader's responses and their verdicts


class Asynchronous:
    """Samples rounds ahead, in threads of each replica's leader.

    A round is begun when all requests of the one before are sent: its own fill the places that become free, so that
    the engine's batch stays full.
    """

    def __init__(
        self, engine: AsynchronousEngine, sampler: Sampler, draw: Callable[[int], Draw], *, max_staleness: int
    ) -> None:
        self._engine = engine
        self._sampler = sampler
        self._draw = draw
        self._max_staleness = max_staleness
        self._leads = sampler.runtime.is_replica_leader
        # The same threads for the whole run: the verifier's workers end with the thread that started them.
        self._threads = ThreadPoolExecutor(max_workers=2) if self._leads else None
        self._begun: deque[_Begun] = deque()
        self._all_sent = Event()  # the requests of the round that was begun last
        self._all_sent.set()
        self._lock = Lock()
        self._under_way = 0  # rounds that are being sampled
        self._sampling_since = 0.0  # if any is
        self._busy = 0.0  # seconds of sampling until then
        self._waited = 0.0  # seconds that training waited for it
        self._since = time.perf_counter()

    def round(self, position: int, *, ahead: int) -> Rollouts:
        draw = self._draw(position)
        for place in range(len(self._begun), 1 + min(ahead, self._max_staleness)):
            self._begun.append(self._submitted(position + place * draw.size))
        begun = self._begun.popleft()
        if begun.position != position:
            raise AssertionError(f"round {begun.position} was sampled ahead, {position} is asked for")
        start = time.perf_counter()
        runtime = self._sampler.runtime
        while True:
            part = self._part(begun)
            lost = self._leads and part is None
            if not any(runtime.gather_objects(lost)):
                break
            self._engine.restore()
            if lost:  # the same prompts and seeds once more
                begun = self._submitted(position)
        self._waited += time.perf_counter() - start
        responses, verdicts = part or (Responses.of_lists([]), torch.zeros(1, dtype=torch.float64))
        responses = Responses.from_leader(responses, runtime.from_replica_leader)
        if not self._leads:
            verdicts = torch.zeros(len(responses) + 1, dtype=torch.float64)
        return self._sampler.together(draw, responses, verdicts)

    def metrics(self) -> dict[str, float]:
        """`idle/trainer` and `idle/engine`: shares of the time since the last call, means over replicas."""
        now = time.perf_counter()
        with self._lock:
            busy = self._busy + (now - max(self._sampling_since, self._since) if self._under_way else 0.0)
        measured = (self._waited, busy) if self._leads else None
        leaders = [pair for pair in self._sampler.runtime.gather_objects(measured) if pair is not None]
        elapsed = now - self._since
        mean_waited, mean_busy = (sum(seconds) / len(leaders) for seconds in zip(*leaders, strict=True))
        with self._lock:
            self._waited, self._busy, self._since = 0.0, 0.0, now
        return {"idle/trainer": mean_waited / elapsed, "idle/engine": max(1 - mean_busy / elapsed, 0.0)}

    def close(self) -> None:
        if self._threads is not None:
            self._engine.drop_requests()
            self._threads.shutdown(cancel_futures=True)

    def _submitted(self, position: int) -> _Begun:
        if self._threads is None:
            return _Begun(position, None)
        before, self._all_sent = self._all_sent, Event()
        return _Begun(position, self._threads.submit(self._sample, position, before, self._all_sent))

    def _sample(self, position: int, before: Event, all_sent: Event) -> tuple[Responses, Tensor]:
        before.wait()
        try:
            own = self._draw(position).of_replica(self._sampler.runtime)
            with self._sampling():
                responses = self._engine.sample_here(own.token_ids, own.seeds, own.sampling, on_sent=all_sent.set)
                return responses, self._sampler.verdicts(own, responses)
        finally:
            all_sent.set()

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Counts the time in which at least one round is being sampled."""
        with self._lock:
            self._under_way += 1
            if self._under_way == 1:
                self._sampling_since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if self._under_way == 0:
                    self._busy += time.perf_counter() - max(self._sampling_since, self._since)

    def _part(self, begun: _Begun) -> tuple[Responses, Tensor] | None:
        """This leader's part, once it is there; None: no leader, or its engine was lost before it was complete."""
        if begun.part is None:
            return None
        try:
            return begun.part.result()
        except EngineLostError:
            return None


def open_producer(sampler: Sampler, prompts: PromptSet, recipe: Recipe) -> Producer:
    """The recipe's producer of training rounds."""
    draw = partial(training_draw, sampler, prompts, recipe)
    if recipe.rollout.max_staleness == 0:
        return Synchronous(sampler, draw)
    engine = cast(AsynchronousEngine, sampler.engine)  # `check_engine` has seen to it
    return Asynchronous(engine, sampler, draw, max_staleness=recipe.rollout.max_staleness)
