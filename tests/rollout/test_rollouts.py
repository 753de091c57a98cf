"""Groups of responses with their rewards, and the rounds in which a step collects them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.data import Prompt, PromptSet, prompt_indices
from eapo_megatron.policy.responses import Responses
from eapo_megatron.records.samples import describe_samples
from eapo_megatron.rollout.engine import ENGINES, SamplingParams, check_engine, check_gives, open_engine, response_seed
from eapo_megatron.rollout.producer import Synchronous
from eapo_megatron.rollout.rollouts import Collected, Draw, Rollouts, Sampler, collect, training_draw

NAN = float("nan")


def prompt(index: int) -> Prompt:
    return Prompt(index, f"prompt {index}", [index], str(index), None)


def rollouts(rewards: Sequence[Sequence[float]]) -> Rollouts:
    """Groups of responses that are told apart by their only token."""
    flat = [reward for group in rewards for reward in group]
    return Rollouts(
        [prompt(index) for index in range(len(rewards))],
        Responses.of_lists([[place] for place in range(len(flat))]),
        torch.tensor([index for index, group in enumerate(rewards) for _ in group], dtype=torch.int64),
        torch.tensor(flat, dtype=torch.float64),
        reward_failures=3,
    )


def tokens(part: Rollouts) -> list[int]:
    return part.responses.tokens.tolist()


def test_a_group_has_signal_when_its_verdicts_differ() -> None:
    groups = rollouts([[1, 1], [1, -1], [NAN, 1], [NAN, 0, 1], [NAN, NAN], [0, 0, 0]])
    assert groups.has_signal.tolist() == [False, True, False, True, False, False]


def test_solve_rate_is_the_share_of_verdicts_above_the_threshold() -> None:
    groups = rollouts([[1, 0, NAN], [0.5, -1]])
    assert groups.solve_rate(0.0) == 2 / 4
    assert groups.solve_rate(0.5) == 1 / 4
    assert rollouts([[NAN]]).solve_rate(0.0) == 0.0


def test_groups_are_kept_with_their_responses_and_numbered_anew() -> None:
    groups = rollouts([[1, 1], [1, -1, 0], [1], [0, 0]])
    kept = groups.groups(torch.tensor([False, True, False, True]))
    assert [p.index for p in kept.prompts] == [1, 3]
    assert tokens(kept) == [2, 3, 4, 6, 7]
    assert kept.group_ids.tolist() == [0, 0, 0, 1, 1]
    assert kept.rewards.tolist() == [1, -1, 0, 0, 0]
    assert tokens(groups.first(2)) == [0, 1, 2, 3, 4]
    assert tokens(groups.first(9)) == tokens(groups)


def test_responses_without_a_verdict_are_left_out() -> None:
    judged = rollouts([[1, NAN], [NAN, NAN], [NAN, 0, 1]]).judged()
    assert [p.index for p in judged.prompts] == [0, 2]
    assert tokens(judged) == [0, 5, 6]
    assert judged.group_ids.tolist() == [0, 1, 1]


def test_parts_follow_one_another() -> None:
    both = Rollouts.concatenated([rollouts([[1, 0], [1]]), rollouts([[0], [1, 1]])])
    assert both.group_ids.tolist() == [0, 0, 1, 2, 3, 3]
    assert both.reward_failures == 6
    assert both.has_signal.tolist() == [True, False, False, False]


def test_samples_are_the_first_response_of_the_first_groups() -> None:
    described = describe_samples(rollouts([[NAN, 0], [1], [0]]), 2, lambda ids: f"text of {ids}")
    assert described == [
        {"prompt": "prompt 0", "response": "text of [0]", "answer": "0", "reward": None, "finished": True},
        {"prompt": "prompt 1", "response": "text of [2]", "answer": "1", "reward": 1.0, "finished": True},
    ]
    assert describe_samples(rollouts([[1]]), 0, str) == []


def test_an_engine_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("an_engine")
    module.open_engine = lambda policy, recipe, tokenizer: (policy, recipe.rollout.max_batch_size, tokenizer)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "an_engine", module)
    monkeypatch.setitem(ENGINES, "mine", "an_engine")

    def recipe(engine: str) -> Recipe:
        parts = {"name": "run", "model": {"path": "model"}, "data": {"task": "arithmetic"}}
        return Recipe.model_validate({**parts, "rollout": {"engine": engine, "max_batch_size": 3}})

    check_engine(recipe("mine"))
    assert open_engine("policy", recipe("mine"), "tokenizer") == ("policy", 3, "tokenizer")  # type: ignore[arg-type,comparison-overlap]
    with pytest.raises(RecipeError, match=r"rollout\.engine must be one of megatron, vllm, mine, got 'yours'"):
        check_engine(recipe("yours"))


def test_an_engine_says_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, unless it says so; an engine of which nothing is asked is not even imported."""
    monkeypatch.setitem(ENGINES, "mine", "an_engine")
    asking = recipe(1, rollout={"engine": "mine"}, algorithm={"old_policy": "rollout"})
    check_gives(recipe(1, rollout={"engine": "mine"}))
    monkeypatch.setitem(sys.modules, "an_engine", ModuleType("an_engine"))
    sentence = (
        r"^algorithm\.old_policy rollout needs entropies of the rollouts, which rollout\.engine mine does not give$"
    )
    with pytest.raises(RecipeError, match=sentence):
        check_gives(asking)
    sys.modules["an_engine"].GIVES = ("entropies",)  # type: ignore[attr-defined]
    check_gives(asking)
    check_gives(recipe(1, algorithm={"old_policy": "rollout"}))  # the embedded engine
    replaying = {
        "rollout": {"top_p": 0.9, "nucleus_replay": True},
        "model": {"path": "m", "head": {"backend": "logits"}},
    }
    check_gives(recipe(1, **replaying))
    with pytest.raises(
        RecipeError, match=r"^rollout\.nucleus_replay needs kept_ids of the rollouts, which .* mine does"
    ):
        check_gives(recipe(1, **replaying | {"rollout": {**replaying["rollout"], "engine": "mine"}}))


class Drawn(Sampler):
    """A sampler whose rewards are told beforehand, prompt by prompt as they are drawn."""

    def __init__(self, rewards: Sequence[Sequence[float]]) -> None:
        self.rewards = list(rewards)
        self.calls: list[tuple[list[int], list[list[int]]]] = []

    def sampling(self, **settings: Any) -> SamplingParams:
        self.settings = SamplingParams(**settings)
        return self.settings

    def sample(self, draw: Draw) -> Rollouts:
        self.calls.append(([p.index for p in draw.prompts], draw.seeds))
        drawn = rollouts([self.rewards.pop(0) for _ in draw.prompts])
        return Rollouts(draw.prompts, drawn.responses, drawn.group_ids, drawn.rewards, 1)


def collected_from(sampler: Drawn, rounds: int, position: int) -> Collected:
    producer = Synchronous(sampler, partial(training_draw, sampler, PROMPTS, recipe(rounds)))
    return collect(partial(producer.round, ahead=rounds), recipe(rounds), position)


def recipe(rounds: int, **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "seed": 5,
            "model": sections.get("model", {"path": "folder"}),
            "data": {"task": "arithmetic"},
            "rollout": {"num_generations_per_prompt": 2, **sections.get("rollout", {})},
            "algorithm": {"dynamic_sampling_rounds": rounds, **sections.get("algorithm", {})},
            "train": {"num_prompts_per_step": 3, "mini_batch_prompts": 1},
        }
    )


PROMPTS = PromptSet([prompt(index) for index in range(20)], too_long=0)
SILENT, TELLING, LOST = [1.0, 1.0], [1.0, -1.0], [NAN, NAN]


def test_one_round_keeps_every_group_with_a_verdict() -> None:
    sampler = Drawn([SILENT, LOST, TELLING])
    collected = collected_from(sampler, 1, 6)
    assert collected.position == 9
    assert collected.groups.rewards.tolist() == [*SILENT, *TELLING]
    order = prompt_indices(5, 6, 3, 20)
    assert sampler.calls == [(order, [[response_seed(5, "train", at, i) for i in range(2)] for at in (6, 7, 8)])]
    assert [p.index for p in collected.groups.prompts] == [order[0], order[2]]
    assert collected.metrics(0.0, version=3) == {
        "rollout/solve_rate": 3 / 4,
        "rollout/rounds": 1,
        "rollout/groups_without_signal": 2,
        "rollout/reward_failures": 1,
        "rollout/staleness_mean": 3.0,
        "rollout/staleness_max": 3.0,
    }


@pytest.mark.parametrize("old_policy", ["forward", "rollout"])
def test_entropies_are_asked_for_where_they_spare_the_forward(old_policy: str) -> None:
    sampler = Drawn([TELLING] * 3)
    training_draw(sampler, PROMPTS, recipe(1, algorithm={"old_policy": old_policy}), 0)
    assert sampler.settings.entropies == (old_policy == "rollout")


@pytest.mark.parametrize(
    ("rewards", "rounds", "kept"),
    [
        ([TELLING] * 3, 1, 3),
        ([SILENT, TELLING, SILENT, TELLING, TELLING, TELLING], 2, 3),  # one too many
        ([SILENT] * 5 + [TELLING] + [SILENT] * 3, 3, 1),  # rounds are used up
        ([SILENT] * 9, 3, 0),
        ([LOST] * 9, 3, 0),
    ],
)
def test_groups_without_signal_are_drawn_anew(rewards: list[list[float]], rounds: int, kept: int) -> None:
    collected = collected_from(Drawn(rewards), 3, 0)
    assert len(collected.drawn) == rounds
    assert collected.position == 3 * rounds
    assert len(collected.groups.prompts) == kept
    assert collected.groups.has_signal.all()
