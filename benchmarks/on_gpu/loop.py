"""A random policy shaped as Qwen2.5-0.5B in bf16: its numbers, its memory and the seconds of a step's phases.

Steps of rollouts by the embedded engine, the old policy's forward, EAPO's advantages and optimizer steps, on random
prompts and rewards: nothing ends a response, so all have the full lengths that `planning` counts with. The log-probs
that are compared are of the first rollouts, by the engine (through its cache) and by the old policy's forward.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.on_gpu.meter import Check, Findings, Measured, measured
from benchmarks.on_gpu.policy import FULL, SMALL, Opened, Rounding, Sizes, opened
from eapo_megatron.config import Recipe
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.memory import worst_rank
from eapo_megatron.planning.shape import model_shape
from eapo_megatron.policy.batching import Batch, TokenData, make_batch, mini_batches
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.rollout.engine import SamplingParams, response_seed
from eapo_megatron.rollout.megatron_engine import MegatronEngine

OFF_PLAN = 0.05  # of what planning predicts


def run(device: torch.device, *, small: bool) -> Findings:
    """Correctness of the first step's numbers, then memory and time."""
    sizes = SMALL if small else FULL
    recipe = sizes.recipe(device)
    findings = Findings()
    with opened(recipe, device) as of_run:
        steps = [take_step(of_run, recipe, sizes, number, findings) for number in range(sizes.steps)]
    memory(of_run, recipe, steps, findings)
    names = steps[0].keys()
    findings.numbers["seconds"] = {
        "first_step": {name: steps[0][name].seconds for name in names},
        "median_of_later": {name: statistics.median(step[name].seconds for step in steps[1:]) for name in names},
    }
    rollout = findings.numbers["seconds"]["median_of_later"]["rollout"]
    findings.numbers["rollout_tokens_per_second"] = sizes.responses * sizes.response_tokens / rollout
    return findings


def take_step(of_run: Opened, recipe: Recipe, sizes: Sizes, number: int, findings: Findings) -> dict[str, Measured]:
    """One step -> its phases."""
    policy, device = of_run.policy, of_run.policy.runtime.device
    worker, algorithm = PolicyWorker.of_recipe(policy, recipe), recipe.make_algorithm()
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=sizes.responses)
    prompts = sizes.random_prompts()
    seeds = [
        [
            response_seed(recipe.seed, "train", number * sizes.prompts + prompt, sample)
            for sample in range(sizes.generations)
        ]
        for prompt in range(sizes.prompts)
    ]
    sampling = SamplingParams(max_response_tokens=sizes.response_tokens)
    rollout = measured(lambda: engine.generate(prompts, seeds, sampling), device)
    group_ids = torch.arange(sizes.prompts).repeat_interleave(sizes.generations)
    rewards = torch.tensor([1.0, -1.0]).repeat(sizes.responses // 2)
    batch = make_batch(prompts, rollout.result, group_ids, rewards, device)
    scoring = measured(lambda: worker.log_probs_and_entropies(batch), device)
    old_log_probs, entropies = scoring.result
    if number == 0:
        parity(of_run, sizes, batch, scoring, findings)

    def update() -> float:
        advantages = algorithm.advantages(
            batch.rewards, batch.group_ids, batch.mask, log_probs=old_log_probs, entropies=entropies
        )
        for rows in mini_batches(batch, recipe.train.mini_batch_prompts):
            tokens = TokenData(
                weights=algorithm.weights(batch.mask_of(rows), batch.group_ids),
                advantages=advantages,
                old_log_probs=old_log_probs,
                old_entropies=entropies,
            )
            done = worker.update(batch, rows, of_run.optimizer, algorithm, tokens)
            applied.append(done.applied)
        return done.metrics["grad_norm"]

    applied: list[bool] = []
    updated = measured(update, device)
    findings.checks.append(Check(f"step {number + 1}: updates without NaN or Inf", sum(applied), 2, at_least=True))
    return {"rollout": rollout, "old_policy": scoring, "update": updated}


def parity(of_run: Opened, sizes: Sizes, batch: Batch, scoring: Measured, findings: Findings) -> None:
    """The first rollouts' numbers, by the engine and by the old policy's forward, against float32 on the CPU."""
    rows = slice(sizes.compared)
    responses = torch.tensor(batch.responses.token_lists()[rows])
    tokens = torch.cat((torch.tensor(batch.prompts[rows]), responses), 1)
    rounding = Rounding(of_run.policy, tokens, batch.mask[rows])
    log_probs, entropies = (values[rows] for values in scoring.result)
    found = [
        # The fused head has logits in float32, the engine's sampler in bf16.
        *rounding.checks("old policy's forward", log_probs, entropies, logits_dtype=torch.float32),
        *rounding.checks("rollouts", batch.rollout_log_probs[rows], logits_dtype=torch.bfloat16),
    ]
    findings.checks += [check for check, _ in found]
    findings.numbers["parity"] = {check.name: errors for check, errors in found}


def memory(of_run: Opened, recipe: Recipe, steps: list[dict[str, Measured]], findings: Findings) -> None:
    """Bytes held at most, in training and in rollouts, beside those that `planning` predicts."""
    assert recipe.model.architecture is not None
    plan = worst_rank(Layout(recipe, model_shape(recipe.model.architecture)))
    # The optimizer makes its state in the first step.
    resident = of_run.built.held + steps[0]["update"].held
    last = steps[-1]
    found: dict[str, Any] = {
        "resident": (resident, plan.resident),
        "training": (resident + max(last["old_policy"].peak, last["update"].peak), plan.training_peak),
        "rollout": (resident + last["rollout"].peak, plan.rollout_peak),
    }
    findings.numbers["bytes"] = {name: {"measured": own, "planned": told} for name, (own, told) in found.items()}
    findings.checks += [
        Check(f"memory, {name}: share off the plan", abs(own / told - 1), OFF_PLAN, is_target=True)
        for name, (own, told) in found.items()
    ]
