"""The solve rate of a policy on prompts kept for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from eapo_megatron.config import Evaluation
from eapo_megatron.data import Prompt
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
