"""Where the rollouts of a step come from: sampled when they are asked for, or ahead of it while the policy trains.

Prompts are drawn in the order of training in rounds of `train.num_prompts_per_step`, and rounds are used in that order,
so a position says all of what was used. With `rollout.max_staleness` n up to n rounds are sampled ahead. Every step
uses one round at least, so none is used more than n weight updates after it was begun.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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

    def round(self, position: int) -> Rollouts:
        """The round that begins with prompt `position` of the order of training."""
        ...

    def sample_ahead(self, position: int, rounds: int) -> None:
        """Lets up to `rounds` rounds, from `position` on, be sampled while the policy trains."""
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

    def round(self, position: int) -> Rollouts:
        return self._sampler.sample(self._draw(position))

    def sample_ahead(self, position: int, rounds: int) -> None:
        """Nothing is sampled ahead."""

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
    """Samples rounds ahead, one after the other, in a thread of each replica's leader."""

    def __init__(
        self, engine: AsynchronousEngine, sampler: Sampler, draw: Callable[[int], Draw], *, max_staleness: int
    ) -> None:
        self._engine = engine
        self._sampler = sampler
        self._draw = draw
        self._max_staleness = max_staleness
        self._leads = sampler.runtime.is_replica_leader
        # One thread for the whole run: the verifier's workers end with the thread that started them.
        self._thread = ThreadPoolExecutor(max_workers=1) if self._leads else None
        self._begun: deque[_Begun] = deque()
        self._busy = 0.0  # seconds of sampling, of rounds that are done
        self._sampling_since: float | None = None
        self._waited = 0.0  # seconds that training waited for it
        self._since = time.perf_counter()

    def round(self, position: int) -> Rollouts:
        if not self._begun:
            self._begin(position)
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
        return self._sampler.together(self._draw(position), responses, verdicts)

    def sample_ahead(self, position: int, rounds: int) -> None:
        per_round = self._draw(position).size
        for ahead in range(len(self._begun), min(rounds, self._max_staleness)):
            self._begin(position + ahead * per_round)

    def metrics(self) -> dict[str, float]:
        """`idle/trainer` and `idle/engine`: shares of the time since the last call, means over replicas."""
        now = time.perf_counter()
        busy = self._busy + (0.0 if self._sampling_since is None else now - max(self._sampling_since, self._since))
        measured = (self._waited, busy) if self._leads else None
        leaders = [pair for pair in self._sampler.runtime.gather_objects(measured) if pair is not None]
        elapsed = now - self._since
        mean_waited, mean_busy = (sum(seconds) / len(leaders) for seconds in zip(*leaders, strict=True))
        self._waited, self._busy, self._since = 0.0, 0.0, now
        return {"idle/trainer": mean_waited / elapsed, "idle/engine": max(1 - mean_busy / elapsed, 0.0)}

    def close(self) -> None:
        if self._thread is not None:
            self._engine.drop_requests()
            self._thread.shutdown(cancel_futures=True)

    def _begin(self, position: int) -> None:
        self._begun.append(self._submitted(position))

    def _submitted(self, position: int) -> _Begun:
        return _Begun(position, self._thread.submit(self._sample, position) if self._thread is not None else None)

    def _sample(self, position: int) -> tuple[Responses, Tensor]:
        self._sampling_since = time.perf_counter()
        try:
            own = self._draw(position).of_replica(self._sampler.runtime)
            responses = self._engine.sample_here(own.token_ids, own.seeds, own.sampling)
            return responses, self._sampler.verdicts(own, responses)
        finally:
            self._busy += time.perf_counter() - max(self._sampling_since, self._since)
            self._sampling_since = None

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
