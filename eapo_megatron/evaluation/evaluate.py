"""The solve rate and Pass@k of a policy on prompts kept for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eapo_megatron.config import Evaluation
from eapo_megatron.data import Prompt
from eapo_megatron.evaluation.pass_at_k import pass_at_k
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


def evaluation_rates(rollouts: Rollouts, positive_threshold: float) -> dict[str, float]:
    """`held_out/solve_rate`, which is Avg@n, and `held_out/pass@k` for k = 2, 4, 8, ... up to n responses a prompt.

    A response without a verdict is left out of the solve rate, and counts as not correct in Pass@k.
    """
    solved = rollouts.group_ids[rollouts.rewards > positive_threshold]
    counts = torch.bincount(solved, minlength=len(rollouts.prompts))
    n = len(rollouts.rewards) // len(rollouts.prompts)
    means = pass_at_k(counts, n).mean(dim=0).tolist()
    powers = [2**power for power in range(1, n.bit_length())]
    return {
        "held_out/solve_rate": rollouts.solve_rate(positive_threshold),
        **{f"held_out/pass@{k}": means[k - 1] for k in powers},
    }
