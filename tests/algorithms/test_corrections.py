"""Corrections and measures of the sampler's mismatch against their definitions, token by token in float64."""

from __future__ import annotations

import math
import statistics as reference
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import Batch, random_batch
from torch import Tensor

from eapo_megatron.algorithms import (
    CORRECTIONS,
    Algorithm,
    Correction,
    LossInputs,
    kept_mass_metrics,
    mismatch_metrics,
)

Ratios = dict[tuple[int, int], float]


def sampled(seed: int, spread: float) -> tuple[Batch, Tensor, Ratios]:
    """A batch, the sampler's log-probs of its tokens, and each token's ratio."""
    batch = random_batch(9, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    rollout = batch.log_probs + spread * torch.randn(batch.mask.shape, generator=generator)
    ratios = {
        (i, t): math.exp(float(batch.log_probs[i, t].double() - rollout[i, t].double()))
        for i, t in batch.mask.nonzero().tolist()
    }
    return batch, rollout, ratios


def of_response(ratios: Ratios, row: int) -> list[float]:
    return [ratio for (i, _), ratio in ratios.items() if i == row]


REFERENCES: dict[str, tuple[dict[str, float], Callable[[Ratios, int, int], float]]] = {
    "none": ({}, lambda ratios, i, t: 1.0),
    "tis": ({"low": 0.7, "high": 1.3}, lambda ratios, i, t: min(max(ratios[i, t], 0.7), 1.3)),
    "icepop": ({"low": 0.8, "high": 1.5}, lambda ratios, i, t: ratios[i, t] if 0.8 <= ratios[i, t] <= 1.5 else 0.0),
    "sequence": (
        {"low": 0.4, "high": 1.8},
        lambda ratios, i, t: product if 0.4 <= (product := math.prod(of_response(ratios, i))) <= 1.8 else 0.0,
    ),
    "geometric": (
        {"low": 0.85, "high": 1.1},
        lambda ratios, i, t: float(0.85 <= reference.geometric_mean(of_response(ratios, i)) <= 1.1),
    ),
}


@pytest.mark.parametrize("veto", [0.0, 0.7])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_are_their_definition(name: str, veto: float) -> None:
    options, of_token = REFERENCES[name]
    batch, rollout, ratios = sampled(seed=4, spread=0.4)
    weights = Correction(name, veto, options).weights(batch.log_probs, rollout, batch.mask)
    assert weights.dtype == torch.float32
    expected = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, t in ratios:
        vetoed = min(of_response(ratios, i)) < veto
        expected[i, t] = 0.0 if vetoed else of_token(ratios, i, t)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    inside = weights[batch.mask]
    if name != "none" or veto:
        assert len(inside.unique()) > 1, "take another seed: nothing is corrected"
    if veto:
        assert (inside == 0).any()


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(CORRECTIONS)))
def test_equal_log_probs_need_no_correction(seed: int, name: str) -> None:
    batch = random_batch(6, 5, seed)
    weights = Correction(name, 1e-4).weights(batch.log_probs, batch.log_probs, batch.mask)
    assert torch.equal(weights, batch.mask.float())


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(CORRECTIONS)))
def test_a_weight_depends_on_its_own_response_alone(seed: int, name: str) -> None:
    """So every layout, however it divides the responses, has the same weights."""
    batch, rollout, _ = sampled(seed, spread=0.3)
    correction = Correction(name, 0.5)
    together = correction.weights(batch.log_probs, rollout, batch.mask)
    for row in range(9):
        rows = slice(row, row + 1)
        alone = correction.weights(batch.log_probs[rows], rollout[rows], batch.mask[rows])
        assert torch.equal(alone, together[rows])


def test_ratios_far_beyond_float32_stay_finite() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    old, rollout = (
        torch.tensor([[0.0, 0.0, 0.0], [-500.0, -1.0, -2.0]]),
        torch.tensor([[-400.0] * 3, [0.0, -1.0, -2.0]]),
    )
    for name in CORRECTIONS:
        assert Correction(name).weights(old, rollout, mask).isfinite().all()
    assert Correction("none", 1e-4).weights(old, rollout, mask).tolist() == [[1.0] * 3, [0.0] * 3]
    assert all(map(math.isfinite, mismatch_metrics(old, rollout, mask).values()))


def test_the_corrected_loss_is_the_weight_times_the_clipped_loss() -> None:
    """Value and gradient; the denominator keeps every token, and the weights carry no gradient."""
    batch, rollout, ratios = sampled(seed=8, spread=0.6)
    algorithm = Algorithm(correction=Correction("icepop", options={"low": 0.6, "high": 1.6}))
    assert algorithm.needs.rollout_log_probs
    corrections = algorithm.corrections(batch.log_probs, rollout, batch.mask)
    assert corrections is not None
    generator = torch.Generator().manual_seed(1)
    log_probs = (batch.log_probs + 0.3 * torch.randn(9, 6, generator=generator)).requires_grad_()
    outputs = algorithm.loss(
        LossInputs(log_probs, batch.log_probs, batch.advantages, batch.mask, corrections=corrections)
    )
    (gradient,) = torch.autograd.grad(outputs.loss, log_probs)
    loss, expected = 0.0, torch.zeros(9, 6, dtype=torch.float64)
    for (i, t), mismatch in ratios.items():
        weight = mismatch if 0.6 <= mismatch <= 1.6 else 0.0
        advantage = float(batch.advantages[i, t])
        ratio = math.exp(float(log_probs[i, t].detach()) - float(batch.log_probs[i, t]))
        clipped = min(max(ratio, 0.8), 1.28)
        loss -= weight * min(ratio * advantage, clipped * advantage) / len(ratios)
        if ratio * advantage <= clipped * advantage:
            expected[i, t] = -weight * ratio * advantage / len(ratios)
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-5)
    assert outputs.metrics["loss/policy"].item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-8)


def test_without_a_correction_there_are_no_weights() -> None:
    batch, rollout, _ = sampled(seed=1, spread=0.1)
    assert Algorithm().corrections(batch.log_probs, rollout, batch.mask) is None
    assert Algorithm(correction=Correction(veto=0.1)).corrections(batch.log_probs, rollout, batch.mask) is not None


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"name": "mis"}, "algorithm.correction.name must be one of none, tis, icepop, sequence, geometric, got 'mis'"),
        ({"name": "tis", "clip": 2.0}, "algorithm.correction.clip is not a key of the correction 'tis'"),
        ({"name": "tis", "high": 0.5}, "algorithm.correction.high must be at least 1 and finite, got 0.5"),
        ({"name": "icepop", "low": -1}, "algorithm.correction.low must be in [0, 1], got -1"),
        ({"name": "geometric", "high": "much"}, "algorithm.correction.high must be a number, got 'much'"),
        ({"veto": 1}, "algorithm.correction.veto must be in [0, 1), got 1"),
        ({"veto": "never"}, "algorithm.correction.veto must be a number, got 'never'"),
        ({"high": 2.0}, "algorithm.correction.high is not a key of the correction 'none'"),
    ],
)
def test_a_wrong_key_is_named(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  compared below
        Algorithm.from_config({"correction": section}, key="algorithm")
    assert str(caught.value).startswith(sentence)


def test_metrics_of_the_mismatch_are_sums_over_all_tokens() -> None:
    batch, rollout, ratios = sampled(seed=2, spread=0.8)
    metrics = mismatch_metrics(batch.log_probs, rollout, batch.mask)
    values = list(ratios.values())
    logs = [math.log(ratio) for ratio in values]
    assert metrics == pytest.approx(
        {
            "log_prob_gap_max": max(map(abs, logs)),
            "kl_k3": reference.fmean(ratio - 1 - log for ratio, log in zip(values, logs, strict=True)),
            "ratio_outside_band": reference.fmean(not 0.5 <= ratio <= 2 for ratio in values),
            "effective_sample_size": sum(values) ** 2 / (len(values) * sum(ratio**2 for ratio in values)),
        },
        rel=1e-9,
    )
    assert 0 < metrics["ratio_outside_band"] < 1
    assert mismatch_metrics(batch.log_probs, rollout, torch.zeros_like(batch.mask)) == {}


def test_the_kept_mass_by_quartiles_of_entropy() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    entropies = torch.tensor([[0.1, 2.0, 0.3, torch.nan], [1.0, 1.5, 0.2, 0.9]])
    kept_mass = torch.tensor([[1.0, 0.7, 0.98, torch.nan], [0.9, 0.8, 0.99, 0.95]])
    assert kept_mass_metrics(kept_mass, entropies, mask) == pytest.approx(
        {
            "kept_mass": (1.0 + 0.7 + 0.98 + 0.9 + 0.8 + 0.99 + 0.95) / 7,
            "kept_mass/q1": (1.0 + 0.99) / 2,
            "kept_mass/q2": (0.98 + 0.95) / 2,
            "kept_mass/q3": (0.9 + 0.8) / 2,
            "kept_mass/q4": 0.7,
        },
        rel=1e-6,
    )
    assert kept_mass_metrics(kept_mass, entropies, torch.zeros_like(mask)) == {}
