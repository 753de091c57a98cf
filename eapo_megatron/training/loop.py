"""The training loop: GRPO's objective with EAPO's advantages (arXiv 2604.11056), one step after the other.

    prompts -> rollouts -> rewards -> (dynamic sampling) -> one forward of the old policy: log-probs AND entropies
    -> group advantages -> shaping -> mini-batches of optimizer steps -> weights to the rollout engine

Every rank holds the whole batch, so the statistics of Eq. 6 need no communication of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eapo_megatron.evaluation.held_out import held_out_solve_rate
from eapo_megatron.training.batching import Batch, make_batch
from eapo_megatron.training.collect import collect
from eapo_megatron.training.metrics import batch_metrics, mean_of_updates
from eapo_megatron.training.policy_worker import Update
from eapo_megatron.training.run import InterruptedRunError, Run, TrainingStoppedError


def train(run: Run) -> dict[str, Any]:
    """Trains to the recipe's last step and returns the summary.

    Raises:
        InterruptedRunError: after a step and its checkpoint, when a rank was asked to stop.
    """
    steps = run.recipe.train.steps
    if run.progress.step == 0:
        evaluate(run)
    while run.progress.step < steps and not run.stopping:
        run.progress.step += 1
        metrics = train_step(run)
        last = run.progress.step == steps
        if last or _due(run, run.recipe.evaluation.every):
            metrics |= evaluate(run)
        log(run, metrics)
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
    algorithm = run.ingredients.algorithm
    with run.timer("rollout"):
        groups, metrics = collect(run)
    if not groups:
        run.progress.skipped_steps += 1
        return metrics
    batch = make_batch(
        [group.prompt.token_ids for group in groups],
        [group.responses for group in groups],
        [group.rewards for group in groups],
        run.runtime.device,
    )
    with run.timer("old_policy"):
        old = run.worker.score(batch)
    if not old.are_finite():
        count_update(run, Update(applied=False, metrics={}))
        return metrics
    with run.timer("advantages"):
        advantages = algorithm.advantages(
            batch.rewards, batch.group_ids, batch.judged, log_probs=old.log_probs, entropies=old.entropies
        )
    updates = []
    with run.timer("update"):
        for rows in mini_batches(batch, run.recipe.train.mini_batch_prompts):
            weights = algorithm.weights(batch.judged & batch.mask_of(rows), batch.group_ids)
            update = run.worker.update(
                batch,
                rows,
                run.optimizer,
                algorithm,
                weights=weights,
                old_log_probs=old.log_probs,
                advantages=advantages,
            )
            updates.append(update)
            count_update(run, update)
    with run.timer("weight_sync"):
        run.sampler.engine.sync_weights()
    run.progress.response_tokens += int(batch.mask.sum())
    return metrics | batch_metrics(algorithm, batch, old, advantages) | mean_of_updates(updates)


def mini_batches(batch: Batch, prompts: int) -> Iterator[list[int]]:
    """Rows of `prompts` whole groups at a time: one optimizer step each."""
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        groups.setdefault(group, []).append(row)
    rows = list(groups.values())
    for start in range(0, len(rows), prompts):
        yield [row for group in rows[start : start + prompts] for row in group]


def count_update(run: Run, update: Update) -> None:
    """Counts an optimizer step; too many skipped in a row end the run."""
    progress, limit = run.progress, run.recipe.train.max_skipped_in_a_row
    if update.applied:
        progress.optimizer_steps += 1
        progress.skipped_in_a_row = 0
        return
    progress.skipped_updates += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row >= limit:
        raise TrainingStoppedError(
            f"step {progress.step}: {limit} updates in a row had NaN or Inf in a loss or gradient; "
            f"the last good checkpoint is in {run.checkpoints.folder}"
        )


def evaluate(run: Run) -> dict[str, float]:
    """The held-out solve rate, remembered by step."""
    if not run.ingredients.held_out:
        return {}
    with run.timer("evaluation"):
        rate = held_out_solve_rate(run)
    run.progress.held_out[str(run.progress.step)] = rate
    if run.progress.step == 0:
        log(run, {"held_out/solve_rate": rate})
    return {"held_out/solve_rate": rate}


def log(run: Run, metrics: dict[str, float]) -> None:
    """One line of metrics, with the seconds of each phase, tokens per second and peak memory.

    Here the ranks also agree whether one of them was asked to stop.
    """
    seconds = run.timer.lap()
    metrics |= seconds | {"skipped_updates": run.progress.skipped_updates}
    if "response_length/total" in metrics:
        metrics["tokens_per_second"] = metrics["response_length/total"] / sum(seconds.values())
    ranks = run.runtime.gather_objects((run.runtime.peak_memory_bytes(), run.stop_request.received))
    metrics["memory/peak_gib"] = max(peak for peak, _ in ranks) / 2**30
    run.stopping = any(asked for _, asked in ranks)
    if run.records is not None:
        run.records.log(run.progress.step, metrics)
        note = f"solve rate {metrics.get('rollout/solve_rate', metrics.get('held_out/solve_rate', 0)):.3f}"
        run.records.advance("training", run.progress.step, run.recipe.train.steps, note)


def _due(run: Run, every: int) -> bool:
    return every > 0 and run.progress.step % every == 0
