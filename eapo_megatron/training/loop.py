"""The training loop: GRPO's objective with EAPO's advantages (arXiv 2604.11056), one step after the other.

    prompts -> rollouts -> rewards -> (dynamic sampling) -> one forward of the old policy: log-probs AND entropies
    -> group advantages -> shaping -> mini-batches of optimizer steps -> weights to the rollout engine

Every rank holds the complete batch, so the statistics of Eq. 6 need no communication of their own.

Departures from textbook GRPO (arXiv 2402.03300), most of them by setting:

- the loss is divided by the response tokens of the optimizer step, over all ranks, not by each response's own length
  (`algorithm.loss.aggregation`);
- the batch of a step is collected once and trained on in mini-batches, each once, with the old policy's log-probs from
  a forward of the training policy, not from the sampler (`algorithm.old_policy`);
- the loss can be weighted against the mismatch of sampler and trainer (`algorithm.correction`);
- KL to a reference policy, the one that the run started from, by setting (`algorithm.loss.kl_coef`);
- the loss can be another one (`algorithm.loss.name`), and reward entropy (`entropy_coef`, adapted to `entropy_target`);
- the advantage differs from token to token (`algorithm.shaping`);
- the clip range is asymmetric (`algorithm.loss.eps_low`, `eps_high`: DAPO's clip-higher, arXiv 2503.14476);
- responses near or at the maximum length can lose reward or leave the loss (`reward.overlong`,
  `algorithm.overlong_filtering`, DAPO);
- groups whose rewards are all equal are replaced by new ones (`algorithm.dynamic_sampling_rounds`, DAPO);
- rollouts are sampled while the policy trains, some updates behind it (`rollout.max_staleness`);
- responses without a verdict (a reward function of the user that crashed or ran out of time) are left out;
- a step whose responses have no verdict at all, and an update with NaN or Inf in its loss or gradients, is skipped;
  too many in a row end the run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from eapo_megatron.evaluation.evaluate import benchmark_metrics, evaluate, evaluation_rates
from eapo_megatron.policy.batching import TokenData, make_batch
from eapo_megatron.records.metrics import batch_metrics, mean_of_updates
from eapo_megatron.rewards.overlong import overlong_rewards
from eapo_megatron.rollout.rollouts import collect
from eapo_megatron.stopping import InterruptedRunError
from eapo_megatron.training.session import Run


def train(run: Run) -> dict[str, Any]:
    """Trains to the recipe's last step and returns the summary.

    Raises:
        InterruptedRunError: after a step and its checkpoint, when a rank was asked to stop.
    """
    steps = run.recipe.train.steps
    if run.progress.step == 0 and (metrics := evaluation_metrics(run)):
        log(run, metrics)
    agree_to_stop(run)
    while run.progress.step < steps and not run.stopping:
        run.progress.step += 1
        metrics = train_step(run)
        last = run.progress.step == steps
        if last or _due(run, run.recipe.evaluation.every):
            metrics |= evaluation_metrics(run)
        log(run, metrics)
        agree_to_stop(run)
        if last or run.stopping or _due(run, run.recipe.checkpoint.every):
            with run.timer("checkpoint"):  # in the next step's seconds: a checkpoint counts on its step's record
                run.save()
    if run.progress.step < steps:
        raise InterruptedRunError(f"stopped on request after step {run.progress.step} of {steps}")
    summary = run.summary()
    if run.records is not None:
        run.records.summarize(summary)
    return summary


def train_step(run: Run) -> dict[str, float]:
    """One rollout batch and its optimizer steps -> metrics."""
    recipe = run.recipe
    with run.timer("rollout"):
        sample_round = partial(run.producer.round, ahead=recipe.train.steps - run.progress.step)
        collected = collect(sample_round, recipe, run.progress.position)
        run.sampler.engine.sleep()
        run.record_samples(collected.drawn[0])
    run.progress.position = collected.position
    metrics, groups = collected.metrics(recipe.reward.positive_threshold, run.sampler.engine.version), collected.groups
    if not collected.is_finite:
        run.count(applied=False, problem="NaN or Inf in the rollouts")
        return metrics
    if not collected.has_verdict:
        run.count(applied=False, problem=f"no verdict of {recipe.reward.function} on any response")
        return metrics
    if not groups.prompts:
        run.progress.skipped_steps += 1
        return metrics
    overlong = overlong_rewards(groups.responses.lengths, recipe.reward.overlong, recipe.rollout.max_response_tokens)
    batch = make_batch(
        [prompt.token_ids for prompt in groups.prompts],
        groups.responses,
        groups.group_ids,
        groups.rewards + overlong,
        run.runtime.device,
    )
    with run.timer("old_policy"):
        old_log_probs, entropies = run.old_policy(batch)
    if not bool(torch.isfinite(old_log_probs).all() & torch.isfinite(entropies).all()):
        run.count(applied=False, problem="NaN or Inf in the old policy")
        return metrics
    ref_log_probs = run.reference_log_probs(batch)
    with run.timer("advantages"):
        algorithm = run.adapted_algorithm(batch, entropies)
        advantages = algorithm.advantages(
            batch.rewards, batch.group_ids, batch.mask, log_probs=old_log_probs, entropies=entropies
        )
        known = TokenData(
            advantages=advantages,
            old_log_probs=old_log_probs,
            old_entropies=entropies,
            rollout_log_probs=batch.rollout_log_probs,
            corrections=algorithm.corrections(old_log_probs, batch.rollout_log_probs, batch.mask),
            ref_log_probs=ref_log_probs,
        )
    run.record_tokens(groups.prompts, batch, old_log_probs, entropies, advantages)
    updates = []
    with run.timer("update"):
        for rows in run.optimizer_steps(batch):
            tokens = run.step_data(algorithm, batch, rows, known)
            updates.append(run.worker.update(batch, rows, run.optimizer, algorithm, tokens))
            run.count(applied=updates[-1].applied)
    with run.timer("weight_sync"):
        run.update_engine()
    run.progress.response_tokens += int(batch.mask.sum())
    of_batch = batch_metrics(algorithm, batch, old_log_probs, entropies, advantages, known.corrections)
    return metrics | of_batch | mean_of_updates(updates)


def evaluation_metrics(run: Run) -> dict[str, float]:
    """The solve rate on the held-out prompts, remembered by step, Pass@k, and both on the benchmarks."""
    recipe, prompts, benchmarks = run.recipe, run.ingredients.evaluation, run.ingredients.benchmarks
    metrics: dict[str, float] = {}
    if not prompts and not benchmarks:
        return metrics
    with run.timer("evaluation"):
        if prompts:
            rollouts = evaluate(run.sampler, prompts, recipe.evaluation, recipe.seed)
            metrics |= evaluation_rates(rollouts, run.ingredients.algorithm.positive_threshold)
            run.progress.evaluations[str(run.progress.step)] = metrics["held_out/solve_rate"]
        for task in benchmarks:
            metrics |= benchmark_metrics(task, run.sampler, recipe)
    return metrics


def log(run: Run, metrics: dict[str, float]) -> None:
    """One line of metrics, with the seconds of each phase, tokens per second and peak memory."""
    seconds = run.timer.lap()
    metrics |= seconds | run.producer.metrics() | {"skipped_updates": run.progress.skipped_updates}
    if "response_length/total" in metrics:
        metrics["tokens_per_second"] = metrics["response_length/total"] / sum(seconds.values())
    metrics["memory/peak_gib"] = max(run.runtime.gather_objects(run.runtime.peak_memory_bytes())) / 2**30
    if run.records is not None:
        run.records.log(run.progress.step, metrics)
        rates = {"solve rate": "rollout/solve_rate", "held-out solve rate": "held_out/solve_rate"}
        notes = [f"{words} {metrics[name]:.3f}" for words, name in rates.items() if name in metrics]
        run.records.advance("training", run.progress.step, run.recipe.train.steps, ", ".join(notes))


def agree_to_stop(run: Run) -> None:
    """All ranks learn whether one of them was asked to stop."""
    run.stopping = any(run.runtime.gather_objects(run.stop_request.received))


def _due(run: Run, every: int) -> bool:
    return every > 0 and run.progress.step % every == 0
