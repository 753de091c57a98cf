"""The solve rate on held-out prompts while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eapo_megatron.rollout.engine import response_seed

if TYPE_CHECKING:
    from eapo_megatron.training.session import Run


def held_out_solve_rate(run: Run) -> float:
    """The share of correct responses to the held-out prompts; the same draws at every evaluation."""
    settings = run.recipe.evaluation
    prompts = run.ingredients.held_out
    seeds = [
        [
            response_seed(run.recipe.seed, "held_out", prompt.index, i)
            for i in range(settings.num_generations_per_prompt)
        ]
        for prompt in prompts
    ]
    sampling = run.sampling(temperature=settings.temperature, top_p=settings.top_p)
    return run.sampler.sample(prompts, seeds, sampling).solve_rate
