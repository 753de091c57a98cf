"""Rounds sampled ahead: in order, none twice, at most so many weight updates old."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.data import Prompt
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.rollout.engine import EngineLostError, SamplingParams, check_engine
from eapo_megatron.rollout.producer import Asynchronous
from eapo_megatron.rollout.rollouts import Draw, Rollouts, Sampler, collect

SIZE = 2  # prompts of a round


class SlowEngine:
    """A response is its prompt; it is of the version that it was begun under."""

    def __init__(self, seconds: float) -> None:
        self.version = 0
        self.seconds = seconds
        self.dropped = threading.Event()
        self.begun: list[int] = []

    def sample_here(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_sent: Callable[[], object],
    ) -> Responses:
        version = self.version
        self.begun.append(prompts[0][0])
        if self.dropped.wait(self.seconds):
            raise EngineLostError("dropped")
        return Responses.of_lists([list(prompt) for prompt in prompts], version=version)

    def drop_requests(self) -> None:
        self.dropped.set()


class Unjudged(Sampler):
    """No reward has signal but every third's."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def verdicts(self, own: Draw, responses: Responses) -> torch.Tensor:
        return torch.tensor([float(tokens[0] % 3 == 0) for tokens in responses.token_lists()] + [0.0]).double()


def draw(position: int) -> Draw:
    prompts = [Prompt(at, "", [at], "", None) for at in range(position, position + SIZE)]
    return Draw(prompts, [[1]] * SIZE, SamplingParams())


def positions(rounds: list[Rollouts]) -> list[int]:
    return [tokens[0] for part in rounds for tokens in part.responses.token_lists()]


@pytest.mark.parametrize("max_staleness", [1, 2, 5])
def test_rounds_come_in_order_and_are_at_most_so_old(max_staleness: int, runtime: Runtime) -> None:
    engine = SlowEngine(0.01)
    producer = Asynchronous(engine, Unjudged(runtime), draw, max_staleness=max_staleness)  # type: ignore[arg-type]
    steps, drawn, staleness, position = 20, [], [], 0
    for step in range(1, steps + 1):
        for _ in range(1 + (step > 12) * (step % 3)):  # dynamic sampling asks for more than a round now and then
            drawn.append(producer.round(position, ahead=steps - step))
            position += SIZE
            staleness.append(engine.version - int(drawn[-1].responses.versions.min()))
        time.sleep(0.02)
        engine.version = step
    producer.close()
    assert positions(drawn) == list(range(position))
    assert max(staleness) == max_staleness
    assert sorted(set(engine.begun)) == engine.begun  # none twice


def test_nothing_is_sampled_beyond_the_last_step(runtime: Runtime) -> None:
    engine = SlowEngine(0.0)
    producer = Asynchronous(engine, Unjudged(runtime), draw, max_staleness=9)  # type: ignore[arg-type]
    assert positions([producer.round(0, ahead=1), producer.round(SIZE, ahead=0)]) == [0, 1, 2, 3]
    producer.close()
    assert engine.begun == [0, SIZE]


def test_closing_does_not_wait_for_what_is_being_sampled(runtime: Runtime) -> None:
    class SlowAfterTheFirst(SlowEngine):
        def sample_here(self, prompts, *args, **kwargs):  # type: ignore[no-untyped-def]
            self.seconds = 60.0 if prompts[0][0] else 0.0
            return super().sample_here(prompts, *args, **kwargs)

    producer = Asynchronous(SlowAfterTheFirst(0), Unjudged(runtime), draw, max_staleness=2)  # type: ignore[arg-type]
    producer.round(0, ahead=2)
    start = time.monotonic()
    producer.close()
    assert time.monotonic() - start < 10


def test_a_round_is_begun_when_all_of_the_one_before_is_sent(runtime: Runtime) -> None:
    sent = {0: threading.Event(), SIZE: threading.Event(), 2 * SIZE: threading.Event()}
    begun, release = [], threading.Event()

    class Sending(SlowEngine):
        def sample_here(self, prompts, seeds, sampling, *, on_sent):  # type: ignore[no-untyped-def]
            begun.append(prompts[0][0])
            assert sent[prompts[0][0]].wait(10)
            on_sent()
            assert release.wait(10)
            return Responses.of_lists([list(prompt) for prompt in prompts], version=0)

    producer = Asynchronous(Sending(0), Unjudged(runtime), draw, max_staleness=2)  # type: ignore[arg-type]
    drawn: list[Rollouts] = []
    asked = threading.Thread(target=lambda: drawn.append(producer.round(0, ahead=2)))
    asked.start()
    for place, (position, event) in enumerate(sent.items()):
        if place == 2:
            release.set()  # two at a time: the third begins when the first one is complete
        while len(begun) <= place:
            time.sleep(0.001)
        time.sleep(0.05)
        assert begun == [0, SIZE, 2 * SIZE][: place + 1], position
        event.set()
    asked.join()
    drawn += [producer.round(SIZE, ahead=1), producer.round(2 * SIZE, ahead=0)]
    producer.close()
    assert positions(drawn) == list(range(6))


def test_idle_shares_say_who_waits(runtime: Runtime) -> None:
    shares = {}
    for what, (sampling, training) in {"slow engine": (0.2, 0.05), "slow training": (0.05, 0.2)}.items():
        producer = Asynchronous(SlowEngine(sampling), Unjudged(runtime), draw, max_staleness=1)  # type: ignore[arg-type]
        producer.round(0, ahead=1)
        producer.metrics()
        for step in range(1, 4):
            time.sleep(training)
            producer.round(step * SIZE, ahead=1)
        shares[what] = producer.metrics()
        producer.close()
    assert shares["slow engine"]["idle/trainer"] > 0.5
    assert shares["slow engine"]["idle/engine"] < 0.3
    assert shares["slow training"]["idle/trainer"] < 0.3
    assert shares["slow training"]["idle/engine"] > 0.5


def test_dynamic_sampling_takes_rounds_from_ahead(runtime: Runtime) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": "folder"},
            "data": {"task": "arithmetic"},
            "rollout": {"num_generations_per_prompt": 2},
            "algorithm": {"dynamic_sampling_rounds": 3},
            "train": {"num_prompts_per_step": SIZE, "mini_batch_prompts": 1},
        }
    )
    engine = SlowEngine(0.0)
    producer = Asynchronous(engine, Unjudged(runtime), draw, max_staleness=4)  # type: ignore[arg-type]
    first = collect(partial(producer.round, ahead=1), recipe, 0)
    second = collect(partial(producer.round, ahead=0), recipe, first.position)
    producer.close()
    assert (first.position, second.position) == (6, 12)
    assert engine.begun == [0, 2, 4, 6, 8, 10]


def test_the_embedded_engine_cannot_sample_ahead() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": "folder"},
            "data": {"task": "arithmetic"},
            "rollout": {"max_staleness": 1},
        }
    )
    with pytest.raises(RecipeError, match=r"rollout\.max_staleness needs an engine in processes of its own"):
        check_engine(recipe)
