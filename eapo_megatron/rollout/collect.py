"""The groups of one step: rollouts with their rewards, and DAPO's dynamic sampling (arXiv 2503.14476)."""

from __future__ import annotations

from eapo_megatron.data import prompt_indices
from eapo_megatron.records.metrics import describe_samples
from eapo_megatron.rollout.engine import response_seed
from eapo_megatron.rollout.sampler import Group, Samples
from eapo_megatron.training.session import Run


def collect(run: Run) -> tuple[list[Group], dict[str, float]]:
    """The step's groups. With several rounds (DAPO's dynamic sampling) groups without signal are drawn anew."""
    recipe, wanted = run.recipe, run.recipe.train.num_prompts_per_step
    rollout, rounds = recipe.rollout, recipe.algorithm.dynamic_sampling_rounds
    sampling = run.sampling(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k)
    kept: list[Group] = []
    drawn: list[Samples] = []
    while len(drawn) < rounds and len(kept) < wanted:
        positions = range(run.progress.position, run.progress.position + wanted)
        order = prompt_indices(recipe.seed, positions.start, wanted, len(run.ingredients.train))
        seeds = [
            [response_seed(recipe.seed, "train", at, i) for i in range(rollout.num_generations_per_prompt)]
            for at in positions
        ]
        samples = run.sampler.sample([run.ingredients.train[index] for index in order], seeds, sampling)
        run.progress.position += wanted
        drawn.append(samples)
        kept += [group for group in samples.groups if rounds == 1 or group.has_signal]
    if run.records is not None:
        shown = describe_samples(drawn[0].groups, run.sampler, recipe.logging.samples_per_step)
        run.records.log_samples(run.progress.step, shown)
    everything = Samples([g for s in drawn for g in s.groups], sum(s.reward_failures for s in drawn))
    return kept[:wanted], {
        "rollout/solve_rate": everything.solve_rate,
        "rollout/rounds": len(drawn),
        "rollout/groups_without_signal": sum(not group.has_signal for group in everything.groups),
        "rollout/reward_failures": everything.reward_failures,
    }
