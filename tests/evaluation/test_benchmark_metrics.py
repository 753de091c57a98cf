"""What the training loop logs of a benchmark, on responses whose verdicts are known."""

from __future__ import annotations

import math
from contextlib import contextmanager
from fractions import Fraction
from math import comb
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eapo_megatron.data import Prompt
from eapo_megatron.evaluation.benchmarks import BENCHMARKS, CHOICE_REWARD
from eapo_megatron.evaluation.evaluate import benchmark_metrics
from eapo_megatron.evaluation.tasks import Task
from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.rollout.engine import response_seed

RECIPE = parse_recipe(
    {
        "name": "run",
        "seed": 7,
        "model": {"path": "folder"},
        "data": {"task": "arithmetic"},
        "rollout": {"max_batch_size": 14},
    },
    source="r.yaml",
)


class Known:
    """A sampler whose sample s of problem p is right where `verdicts[p][s]` says so; it judges by one reward."""

    def __init__(self, verdicts: dict[int, list[float]], reward: str = "math") -> None:
        self.verdicts, self.reward = verdicts, reward
        self.runtime: Any = SimpleNamespace(data_parallel_size=1)
        self.batches: list[list[int]] = []

    def sampling(self, **settings: float) -> dict[str, float]:
        return settings

    @contextmanager
    def judged_by(self, recipe: Any) -> Any:
        self.reward = recipe.reward.function
        yield self

    def sample(self, draw: Any) -> Any:
        assert draw.sampling == {"temperature": 0.6, "top_p": 0.95}
        problems = [prompt.index for prompt in draw.prompts]
        self.batches.append(problems)
        name = "mmlu_pro" if self.reward == CHOICE_REWARD else "amc"
        for problem, seeds in zip(problems, draw.seeds, strict=True):
            assert seeds == [response_seed(7, f"benchmark {name}", problem, i) for i in range(len(seeds))]
        rewards = [verdict for problem in problems for verdict in self.verdicts[problem]]
        return SimpleNamespace(rewards=torch.tensor(rewards, dtype=torch.float64))


def of(name: str, n: int, verdicts: dict[int, list[float]]) -> tuple[dict[str, float], Known]:
    sampler = Known(verdicts)
    prompts = {problem: Prompt(problem, "?", [3], "1", None) for problem in verdicts}
    task = Task(BENCHMARKS[name], prompts, n, [])
    return benchmark_metrics(task, sampler, RECIPE), sampler  # type: ignore[arg-type]


def test_averages_over_problems_and_pass_at_the_powers_of_two() -> None:
    """Problems of 0, 1, 3 and 6 right ones of 6; one without a verdict is not right."""
    right = {0: 0, 2: 1, 5: 3, 6: 6}
    verdicts = {problem: [1.0] * c + [-1.0] * (6 - c) for problem, c in right.items()}
    verdicts[5][-1] = math.nan
    found, sampler = of("amc", 6, verdicts)
    assert sampler.reward == "math"
    assert sampler.batches == [[0, 2], [5, 6]]  # 14 responses at once are two problems of six
    expected = {
        f"eval/amc/pass@{k}": mean([1 - Fraction(comb(6 - c, k), comb(6, k)) for c in right.values()])
        for k in (1, 2, 4)
    }
    expected["eval/amc/avg@6"] = mean([Fraction(c, 6) for c in right.values()])
    assert found == pytest.approx(expected, rel=1e-12)


def mean(values: list[Fraction]) -> float:
    return float(sum(values) / len(values))


def test_choices_are_judged_by_their_letter() -> None:
    found, sampler = of("mmlu_pro", 1, {0: [1.0], 1: [-1.0], 2: [-1.0], 3: [-1.0]})
    assert sampler.reward == CHOICE_REWARD
    assert found == {"eval/mmlu_pro/avg@1": 0.25, "eval/mmlu_pro/pass@1": 0.25}
