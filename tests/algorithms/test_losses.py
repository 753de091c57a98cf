"""Each method's loss against its formula, token by token in float64 by the math module: value, gradient and metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_batches import Batch, random_batch

from eapo_megatron.algorithms import (
    LossInputs,
    LossSettings,
    SelectionInputs,
    loss_weights,
    policy_loss,
    uniform_draws,
)
from eapo_megatron.algorithms.losses import LOSSES

SEEDS = range(12)


def loss_inputs(batch: Batch, seed: int, spread: float = 0.3) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    shift = spread * torch.randn(batch.mask.shape, generator=generator)
    return LossInputs(
        log_probs=(batch.log_probs + shift).requires_grad_(),
        old_log_probs=batch.log_probs,
        advantages=batch.advantages,
        mask=batch.mask,
        selected=(torch.rand(batch.mask.shape, generator=generator) < 0.3).float(),
    )


Token = Callable[[float, float, float, float, float], tuple[float, float]]  # log_prob, old, A, selected, s: loss, slope


def of_kl_cov(log_prob: float, old: float, advantage: float, selected: float, _: float) -> tuple[float, float]:
    ratio, distance = math.exp(log_prob - old), abs(log_prob - old)
    sign = math.copysign(1, log_prob - old)
    return -ratio * advantage + 0.7 * selected * distance, -ratio * advantage + 0.7 * selected * sign


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """PPO's loss of a token and its derivative by log pi."""
    loss = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
    is_clipped = (ratio < low and advantage < 0) or (ratio > high and advantage > 0)
    return loss, 0.0 if is_clipped else -ratio * advantage


def of_dual_clip(log_prob: float, old: float, advantage: float, _: float, __: float) -> tuple[float, float]:
    ratio = math.exp(log_prob - old)
    if advantage < 0 and ratio > 1.2:
        return -1.2 * advantage, 0.0
    return clipped(ratio, advantage, 0.8, 1.3)


def of_clip_cov(log_prob: float, old: float, advantage: float, selected: float, _: float) -> tuple[float, float]:
    loss, slope = clipped(math.exp(log_prob - old), advantage, 0.8, 1.3)
    return (0.0, 0.0) if selected else (loss, slope)


def of_ce_gppo(log_prob: float, old: float, advantage: float, _: float, __: float) -> tuple[float, float]:
    ratio = math.exp(log_prob - old)
    if ratio < 0.8 and advantage < 0:
        return -0.5 * 0.8 * advantage, -0.5 * 0.8 * advantage
    if ratio > 1.3 and advantage > 0:
        return -0.9 * 1.3 * advantage, -0.9 * 1.3 * advantage
    return -ratio * advantage, -ratio * advantage


def of_gspo(_: float, __: float, advantage: float, ___: float, sequence_ratio: float) -> tuple[float, float]:
    return clipped(sequence_ratio, advantage, 0.95, 1.04)


def of_cispo(log_prob: float, old: float, advantage: float, _: float, __: float) -> tuple[float, float]:
    weight = min(max(math.exp(log_prob - old), 0.8), 1.3)
    return -weight * advantage * log_prob, -weight * advantage


CASES: dict[str, tuple[Token, dict[str, Any]]] = {
    "clipped_surrogate": (of_dual_clip, {"eps_low": 0.2, "eps_high": 0.3, "dual_clip": 1.2}),
    "kl_cov": (of_kl_cov, {"coefficient": 0.7}),
    "clip_cov": (of_clip_cov, {"eps_low": 0.2, "eps_high": 0.3}),
    "ce_gppo": (of_ce_gppo, {"eps_low": 0.2, "eps_high": 0.3, "beta_low": 0.5, "beta_high": 0.9}),
    "gspo": (of_gspo, {"eps_low": 0.05, "eps_high": 0.04, "aggregation": "seq_mean_token_mean"}),
    "cispo": (of_cispo, {"eps_low": 0.2, "eps_high": 0.3}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_losses_match_their_formulas(name: str, seed: int) -> None:
    formula, options = CASES[name]
    settings = LossSettings(name, **options)
    inputs = loss_inputs(random_batch(9, 6, seed), seed)
    outputs = policy_loss(inputs, settings)
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.log_probs)
    weights = loss_weights(inputs.mask, None, aggregation=settings.aggregation).double()
    expected, loss, differing = torch.zeros(9, 6, dtype=torch.float64), 0.0, 0
    assert inputs.selected is not None
    for i, t in inputs.mask.nonzero().tolist():
        response = inputs.mask[i].nonzero().flatten().tolist()
        log_ratio = statistics.fmean(
            float(inputs.log_probs.detach()[i, s]) - float(inputs.old_log_probs[i, s]) for s in response
        )
        values = [
            float(tensor.detach()[i, t])
            for tensor in (inputs.log_probs, inputs.old_log_probs, inputs.advantages, inputs.selected)
        ]
        value, slope = formula(*values, math.exp(log_ratio))  # type: ignore[call-arg]
        loss += float(weights[i, t]) * value
        expected[i, t] = float(weights[i, t]) * slope
        differing += slope != -math.exp(values[0] - values[1]) * values[2]
    assert differing > 1  # from plain policy gradient: the options matter
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}], ids=["alone", "kl", "entropy"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_response_that_need_not_be_trained_has_no_loss_and_no_gradient(name: str, settings: dict[str, float]) -> None:
    inputs = loss_inputs(random_batch(9, 6, 4), 4)
    assert inputs.selected is not None
    rows = torch.arange(9)[:, None]
    inputs = replace(
        inputs,
        advantages=torch.where(rows < 6, 0.0, inputs.advantages),
        selected=torch.where(rows < 3, 0.0, 1.0).expand(9, 6),
    )
    settings_of_loss = LossSettings(name, **settings)
    trained = settings_of_loss.trained(inputs.advantages, inputs.mask, inputs.selected)
    has_tokens = inputs.mask.any(dim=1)
    if name == "negative_log_likelihood" or settings:
        assert trained.all()
        return
    assert torch.equal(trained, (rows[:, 0] >= 3) & has_tokens)
    untouched = settings_of_loss.trained(inputs.advantages, inputs.mask, None)
    assert torch.equal(untouched, (rows[:, 0] >= 6) & has_tokens)
    (gradient,) = torch.autograd.grad(policy_loss(inputs, settings_of_loss).loss, inputs.log_probs)
    assert not gradient[~trained].any()
    unknown = torch.where(rows == 0, torch.nan, inputs.advantages)
    assert settings_of_loss.trained(unknown, inputs.mask, None)[0] == has_tokens[0]


def test_the_gradient_of_gspo_is_that_of_its_sequence_form() -> None:
    """Eq. 5 of arXiv 2507.18071 by autograd in float64, where A is the same at all tokens of a response."""
    inputs = loss_inputs(random_batch(9, 6, 3), 3)
    outputs = policy_loss(inputs, LossSettings("gspo", eps_low=0.05, eps_high=0.04, aggregation="seq_mean_token_mean"))
    (gradient,) = torch.autograd.grad(outputs.loss, inputs.log_probs)
    mask, lengths = inputs.mask, inputs.mask.sum(dim=1)
    log_probs = torch.where(mask, inputs.log_probs.detach(), 0.0).double().requires_grad_()
    old = torch.where(mask, inputs.old_log_probs, 0.0).double()
    advantages = torch.where(mask, inputs.advantages, 0.0).double().sum(dim=1) / lengths.clamp(min=1)
    ratio = ((log_probs - old).sum(dim=1) / lengths.clamp(min=1)).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.04) * advantages)[lengths > 0].mean()
    (expected,) = torch.autograd.grad(loss, log_probs)
    assert outputs.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected * mask, rtol=1e-5, atol=1e-7)


def test_kl_cov_has_no_effect_while_the_policy_is_the_old_one() -> None:
    batch = random_batch(9, 6, 1)
    for change, same in ((0.0, True), (1e-2, False)):
        gradients = []
        for coefficient in (0.0, 1.0):
            log_probs = (batch.log_probs + change).requires_grad_()
            inputs = LossInputs(
                log_probs, batch.log_probs, batch.advantages, batch.mask, selected=torch.ones(batch.mask.shape)
            )
            settings = LossSettings("kl_cov", coefficient=coefficient)
            gradients.append(torch.autograd.grad(policy_loss(inputs, settings).loss, log_probs)[0])
        assert torch.equal(*gradients) == same


@pytest.mark.parametrize("loss", ["kl_cov", "clip_cov", "ce_gppo", "gspo", "cispo"])
@pytest.mark.parametrize("log_ratio", [-1e30, -150.0, 150.0, 1e30])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_log_ratios_give_finite_losses_and_gradients(loss: str, log_ratio: float, advantage: float) -> None:
    log_probs, one = torch.tensor([[log_ratio]], requires_grad=True), torch.ones(1, 1)
    inputs = LossInputs(log_probs, 0 * one, advantage * one, one.bool(), selected=one)
    outputs = policy_loss(inputs, LossSettings(loss))
    outputs.loss.backward()
    assert all(math.isfinite(value.item()) for value in (outputs.loss, *outputs.metrics.values()))
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def selection_inputs(seed: int) -> SelectionInputs:
    batch = random_batch(9, 6, seed)
    return SelectionInputs(
        batch.advantages, batch.log_probs, batch.mask, uniform_draws(7, seed, batch.mask.shape, torch.device("cpu"))
    )


def expected_covariances(inputs: SelectionInputs) -> dict[tuple[int, int], float]:
    tokens = [(i, t) for i, t in inputs.mask.nonzero().tolist()]
    advantages, log_probs = (
        {token: float(values[token]) for token in tokens} for values in (inputs.advantages, inputs.log_probs)
    )
    mean_advantage, mean_log_prob = (statistics.fmean(values.values()) for values in (advantages, log_probs))
    return {token: (advantages[token] - mean_advantage) * (log_probs[token] - mean_log_prob) for token in tokens}


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_cov_marks_the_top_tokens_by_covariance(seed: int) -> None:
    inputs = selection_inputs(seed)
    selected = LossSettings("kl_cov", fraction=0.2).selected(inputs)
    assert selected is not None
    values = expected_covariances(inputs)
    ordered = sorted(values, key=values.__getitem__, reverse=True)
    expected = set(ordered[: max(1, round(0.2 * len(values)))])
    assert {(i, t) for i, t in selected.nonzero().tolist()} == expected
    assert set(selected.unique().tolist()) <= {0.0, 1.0}
    one = LossSettings("kl_cov").selected(inputs)
    assert one is not None
    assert one.sum() == 1  # a fraction of 2e-3 of few tokens


@pytest.mark.parametrize("seed", SEEDS)
def test_clip_cov_draws_among_tokens_of_high_covariance(seed: int) -> None:
    inputs = selection_inputs(seed)
    settings = LossSettings("clip_cov", fraction=0.15, covariance_low=0.05, covariance_high=0.3)
    selected = settings.selected(inputs)
    assert selected is not None
    values = expected_covariances(inputs)
    candidates = [token for token, value in values.items() if 0.05 < value < 0.3]
    candidates.sort(key=lambda token: float(inputs.draws[token]), reverse=True)
    expected = set(candidates[: max(1, int(0.15 * len(values)))])
    assert {(i, t) for i, t in selected.nonzero().tolist()} == expected


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    shape, cpu = torch.Size((50, 40)), torch.device("cpu")
    draws = uniform_draws(1, 2, shape, cpu)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(draws, uniform_draws(1, 2, shape, cpu))
    for other in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(draws, uniform_draws(*other, shape, cpu))
    assert 0 <= float(draws.min()) < 0.01
    assert 0.99 < float(draws.max()) < 1


def test_the_entropy_coefficient_follows_its_target() -> None:
    settings = LossSettings(entropy_target=0.2, entropy_coef_step=0.005)
    coefficient, applied = 0.0, []
    for entropy in (0.1, 0.1, 0.15, 0.3, 0.2, 0.5, 0.5, 0.5):
        of_step, coefficient = settings.adapted(coefficient, entropy)
        applied.append(of_step.entropy_coef)
        assert replace(of_step, entropy_coef=settings.entropy_coef) == settings
    assert applied == pytest.approx([0.0, 0.005, 0.01, 0.0, 0.01, 0.0, 0.0, 0.0])
    assert coefficient == 0.0
    assert "entropies" not in settings.reads
    assert "entropies" in settings.adapted(0.1, 0.1)[0].reads
    fixed = LossSettings(entropy_coef=0.3)
    assert fixed.adapted(0.3, 9.0) == (fixed, 0.3)


def test_an_empty_step_marks_nothing() -> None:
    nothing = torch.full((2, 3), float("nan"))
    inputs = SelectionInputs(nothing, nothing, torch.zeros(2, 3, dtype=torch.bool), torch.rand(2, 3))
    for name in ("kl_cov", "clip_cov"):
        selected = LossSettings(name).selected(inputs)
        assert selected is not None
        assert not selected.any()
