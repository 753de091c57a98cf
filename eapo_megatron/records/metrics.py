"""What a step says of itself, as global sums over counts: never means of means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, kept_mass_metrics, mismatch_metrics
from eapo_megatron.policy.batching import Batch
from eapo_megatron.policy.worker import Update


def batch_metrics(
    algorithm: Algorithm,
    batch: Batch,
    old_log_probs: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    corrections: Tensor | None,
) -> dict[str, float]:
    """Rewards, lengths, entropies (nats), the four quadrants and the sampler's mismatch of the batch trained on."""
    mask, lengths = batch.mask, batch.mask.sum(dim=-1)
    tokens = int(lengths.sum())
    log_prob_gap = (old_log_probs - batch.rollout_log_probs).abs() * mask
    return {
        "reward/mean": float(batch.rewards.double().mean()),
        "response_length/mean": tokens / batch.size,
        "response_length/max": float(lengths.max()),
        "response_length/total": tokens,
        "response_length/truncated_share": float((~batch.finished).double().mean()),
        "rollout/log_prob_gap": float(log_prob_gap.double().sum()) / tokens,
        **_of_sampler(batch, old_log_probs, entropies, corrections),
        **algorithm.metrics(batch.rewards, batch.group_ids, mask, entropies=entropies, advantages=advantages),
    }


def _of_sampler(batch: Batch, old_log_probs: Tensor, entropies: Tensor, corrections: Tensor | None) -> dict[str, float]:
    """How far the sampler is from the trainer, what it kept of the softmax, and what the correction makes of it."""
    mask = batch.mask
    metrics = mismatch_metrics(old_log_probs, batch.rollout_log_probs, mask)
    if batch.kept_mass is not None:
        metrics |= kept_mass_metrics(batch.kept_mass, entropies, mask)
    metrics = {f"rollout/{name}": value for name, value in metrics.items()}
    if corrections is not None:
        metrics["correction/mean_weight"] = float(corrections[mask].mean(dtype=torch.float64))
        metrics["correction/zero_share"] = float((corrections[mask] == 0).double().mean())
    return metrics


def mean_of_updates(updates: Sequence[Update]) -> dict[str, float]:
    """Each metric's mean over the step's optimizer steps (each is one sample of the loss), and how many there were.

    A step in which nothing had a gradient lacks the metrics of trained tokens.
    """
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.metrics.items():
            values.setdefault(name, []).append(value)
    means = {name: sum(of_steps) / len(of_steps) for name, of_steps in values.items()}
    return {**means, "updates": len(updates)}
