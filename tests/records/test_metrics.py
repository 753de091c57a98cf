"""What a step says of its batch and of its updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eapo_megatron.algorithms import Algorithm, Correction
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.worker import Update
from eapo_megatron.records.metrics import batch_metrics, mean_of_updates

RESPONSES = Responses.of_lists([[3, 4, 5], [6]], log_probs=[[-1.0, -2.0, -3.0], [-0.5]], finished=[True, False])


def metrics_of(responses: Responses, algorithm: Algorithm) -> dict[str, float]:
    batch = make_batch([[1]], responses, torch.tensor([0, 0]), torch.tensor([1.0, -1.0]), torch.device("cpu"))
    old_log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, 7.0, 7.0]])
    entropies = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    corrections = algorithm.corrections(old_log_probs, batch.rollout_log_probs, batch.mask)
    return batch_metrics(algorithm, batch, old_log_probs, entropies, torch.zeros(2, 3), corrections)


def test_the_samplers_mismatch_is_told_at_every_step() -> None:
    metrics = metrics_of(RESPONSES, Algorithm())
    assert metrics["rollout/log_prob_gap"] == pytest.approx(1 / 4)
    assert metrics["rollout/log_prob_gap_max"] == pytest.approx(1.0)
    assert metrics["rollout/ratio_outside_band"] == pytest.approx(1 / 4)
    assert not any(name.startswith(("correction/", "rollout/kept_mass")) for name in metrics)


def test_the_kept_mass_and_the_correction_are_told_where_there_are_any() -> None:
    responses = replace(RESPONSES, kept_mass=torch.tensor([1.0, 0.9, 0.8, 0.7]))
    metrics = metrics_of(responses, Algorithm(correction=Correction("icepop")))
    assert [metrics[f"rollout/kept_mass/q{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert metrics["correction/mean_weight"] == pytest.approx(3 / 4)
    assert metrics["correction/zero_share"] == pytest.approx(1 / 4)


def test_updates_are_averaged_and_there_may_be_none() -> None:
    updates = [Update(applied=True, metrics={"loss/policy": value}) for value in (1.0, 2.0)]
    assert mean_of_updates(updates) == {"loss/policy": 1.5, "updates": 2}
    assert mean_of_updates([]) == {"updates": 0}
    with_ratio = Update(applied=True, metrics={"loss/policy": 3.0, "ratio/mean": 1.5})
    assert mean_of_updates([updates[0], with_ratio]) == {"loss/policy": 2.0, "ratio/mean": 1.5, "updates": 2}
