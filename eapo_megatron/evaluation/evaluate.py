"""A policy on prompts kept for evaluation: solve rate and Pass@k on held-out ones, Avg@k and Pass@k on benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch

from eapo_megatron.config import Evaluation, Recipe
from eapo_megatron.data import Prompt
from eapo_megatron.evaluation.pass_at_k import pass_at_k
from eapo_megatron.evaluation.response_file import Key
from eapo_megatron.evaluation.tasks import Task, with_reward_of
from eapo_megatron.rollout.engine import response_seed
from eapo_megatron.rollout.rollouts import Draw, Rollouts, Sampler


def evaluate(sampler: Sampler, prompts: Sequence[Prompt], settings: Evaluation, seed: int) -> Rollouts:
    """Responses to the prompts, verified; the same draws at every evaluation with this seed."""
    seeds = [
        [response_seed(seed, "held_out", prompt.index, i) for i in range(settings.num_generations_per_prompt)]
        for prompt in prompts
    ]
    sampling = sampler.sampling(temperature=settings.temperature, top_p=settings.top_p)
    return sampler.sample(Draw(list(prompts), seeds, sampling))


def answers_to(
    task: Task, wanted: Sequence[Key], sampler: Sampler, recipe: Recipe
) -> Iterator[tuple[list[Key], Rollouts]]:
    """The wanted responses to a benchmark, verified, batch of problems by batch; every rank goes through all of them.

    A response is a function of the weights, the seed, its benchmark, its problem and its sample number alone.
    """
    name, samples = task.benchmark.name, dict[int, list[int]]()
    for _, problem, sample in wanted:
        samples.setdefault(problem, []).append(sample)
    together = max(1, recipe.rollout.max_batch_size // task.n) * sampler.runtime.data_parallel_size
    sampling = sampler.sampling(temperature=recipe.evaluation.temperature, top_p=recipe.evaluation.top_p)
    left = iter(samples)
    while batch := list(islice(left, together)):
        seeds = [[response_seed(recipe.seed, f"benchmark {name}", p, i) for i in samples[p]] for p in batch]
        keys = [(name, problem, sample) for problem in batch for sample in samples[problem]]
        yield keys, sampler.sample(Draw([task.prompts[problem] for problem in batch], seeds, sampling))


def benchmark_metrics(task: Task, sampler: Sampler, recipe: Recipe) -> dict[str, float]:
    """eval/NAME/avg@n and eval/NAME/pass@k for the powers of two up to n, the same on every rank.

    They are what `eapo-megatron evaluate` gives for these weights: a response without a verdict is not correct.
    """
    if task.benchmark.choices:
        with sampler.judged_by(with_reward_of(recipe, task.benchmark)) as of_choices:
            correct = _correct(task, of_choices, recipe)
    else:
        correct = _correct(task, sampler, recipe)
    rates = _pass_rates(correct.values(), task.n)
    name = f"eval/{task.benchmark.name}"
    return {f"{name}/avg@{task.n}": rates[1], **{f"{name}/pass@{k}": rate for k, rate in rates.items()}}


def _correct(task: Task, sampler: Sampler, recipe: Recipe) -> dict[int, int]:
    """How many of a problem's responses are correct, problem by problem."""
    correct = dict.fromkeys(task.prompts, 0)
    for keys, rollouts in answers_to(task, list(task.wanted()), sampler, recipe):
        are_correct = (rollouts.rewards > recipe.reward.positive_threshold).tolist()
        for (_, problem, _), is_correct in zip(keys, are_correct, strict=True):
            correct[problem] += is_correct
    return correct


def evaluation_rates(rollouts: Rollouts, positive_threshold: float) -> dict[str, float]:
    """`held_out/solve_rate`, which is Avg@n, and `held_out/pass@k` for k = 2, 4, 8, ... up to n responses a prompt.

    A response without a verdict is left out of the solve rate, and counts as not correct in Pass@k.
    """
    solved = rollouts.group_ids[rollouts.rewards > positive_threshold]
    counts = torch.bincount(solved, minlength=len(rollouts.prompts))
    n = len(rollouts.rewards) // len(rollouts.prompts)
    rates = _pass_rates(counts.tolist(), n)
    return {
        "held_out/solve_rate": rollouts.solve_rate(positive_threshold),
        **{f"held_out/pass@{k}": rate for k, rate in rates.items() if k > 1},
    }


def _pass_rates(correct: Iterable[int], n: int) -> dict[int, float]:
    """Mean Pass@k over problems for the powers of two up to n, from how many of n responses to each are correct."""
    means = pass_at_k(list(correct), n).mean(0).tolist()
    return {2**power: means[2**power - 1] for power in range(n.bit_length())}
