import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import Batch, batches
from torch import Tensor

from eapo_megatron.algorithms import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    QUADRANTS,
    LossInputs,
    LossSettings,
    ShapingInputs,
    loss_weights,
    policy_loss,
    policy_loss_unchecked,
    shape_advantages,
)

EVERYTHING = LossSettings(kl_coef=0.3, entropy_coef=0.05)


def loss_inputs(batch: Batch, seed: int, spread: float = 0.5) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def shifted() -> Tensor:
        return batch.log_probs + spread * torch.randn(batch.mask.shape, generator=generator)

    return LossInputs(
        log_probs=shifted().requires_grad_(),
        old_log_probs=shifted(),
        advantages=batch.advantages,
        mask=batch.mask,
        group_ids=batch.group_ids,
        entropies=batch.entropies.clone().requires_grad_(),
        ref_log_probs=shifted(),
    )


def reference_terms(inputs: LossInputs, loss_settings: LossSettings, i: int, t: int) -> dict[str, float]:
    """The token's value of every term and metric, and the derivatives of its loss, with the math module alone."""
    log_prob, old, advantage, entropy, ref = (
        float(values.detach()[i, t])
        for values in (
            inputs.log_probs,
            inputs.old_log_probs,
            inputs.advantages,
            inputs.entropies,
            inputs.ref_log_probs,
        )
    )
    ratio, low, high = math.exp(log_prob - old), 1 - loss_settings.eps_low, 1 + loss_settings.eps_high
    if loss_settings.loss == "negative_log_likelihood":
        terms, slope = {"loss/policy": -log_prob}, -1.0
    else:
        clipped_low, clipped_high = ratio < low and advantage < 0, ratio > high and advantage > 0
        terms = {
            "loss/policy": -min(ratio * advantage, min(max(ratio, low), high) * advantage),
            "clip_fraction/low": float(clipped_low),
            "clip_fraction/high": float(clipped_high),
            "kl/old_policy": ratio - 1 - math.log(ratio),
            "ratio/mean": ratio,
        }
        slope = 0.0 if clipped_low or clipped_high else -ratio * advantage
    kl, kl_slope = {
        "k1": (log_prob - ref, 1.0),
        "k2": ((log_prob - ref) ** 2 / 2, log_prob - ref),
        "k3": (math.exp(ref - log_prob) - 1 - (ref - log_prob), 1 - math.exp(ref - log_prob)),
    }[loss_settings.kl_estimator]
    loss = terms["loss/policy"]
    if loss_settings.kl_coef:
        terms["loss/kl"] = kl
        loss, slope = loss + loss_settings.kl_coef * kl, slope + loss_settings.kl_coef * kl_slope
    if loss_settings.entropy_coef:
        terms["loss/entropy"] = entropy
        loss -= loss_settings.entropy_coef * entropy
    return {**terms, "loss": loss, "slope": slope}


@given(
    batch=batches(),
    seed=st.integers(0, 2**31),
    loss=st.sampled_from(["clipped_surrogate", "negative_log_likelihood"]),
    aggregation=st.sampled_from(sorted(AGGREGATIONS)),
    kl_coef=st.sampled_from([0.0, 0.3]),
    kl_estimator=st.sampled_from(sorted(KL_ESTIMATORS)),
    entropy_coef=st.sampled_from([0.0, 0.05]),
)
def test_loss_gradient_and_metrics_match_the_formulas(batch: Batch, seed: int, **named: object) -> None:
    loss_settings = LossSettings(**named)  # type: ignore[arg-type]
    inputs = loss_inputs(batch, seed)
    outputs = policy_loss(inputs, loss_settings)
    log_prob_gradient, entropy_gradient = torch.autograd.grad(
        outputs.loss, (inputs.log_probs, inputs.entropies), materialize_grads=True
    )

    weights = loss_weights(batch.mask, batch.group_ids, aggregation=loss_settings.aggregation).double()
    expected = {"loss": 0.0} | dict.fromkeys(outputs.metrics, 0.0)
    expected_gradient = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, t in batch.mask.nonzero().tolist():
        terms = reference_terms(inputs, loss_settings, i, t)
        expected_gradient[i, t] = float(weights[i, t]) * terms.pop("slope")
        assert terms.keys() == expected.keys()
        expected = {name: expected[name] + float(weights[i, t]) * value for name, value in terms.items()}
    actual = {"loss": outputs.loss.item()} | {name: value.item() for name, value in outputs.metrics.items()}
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(log_prob_gradient, expected_gradient.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy_gradient, (-loss_settings.entropy_coef * weights).float())
    assert not any(value.requires_grad for value in outputs.metrics.values())


@given(batch=batches(min_responses=2), seed=st.integers(0, 2**31), aggregation=st.sampled_from(sorted(AGGREGATIONS)))
def test_micro_batches_add_up_to_the_whole(batch: Batch, seed: int, aggregation: str) -> None:
    loss_settings = replace(EVERYTHING, aggregation=aggregation)
    inputs = loss_inputs(batch, seed)
    whole = policy_loss(inputs, loss_settings)
    weights = loss_weights(batch.mask, batch.group_ids, aggregation=aggregation)
    totals = dict.fromkeys([*whole.metrics, "loss"], 0.0)
    fields = {name: getattr(inputs, name) for name in LossInputs.__dataclass_fields__} | {"weights": weights}
    for rows in (slice(0, 1), slice(1, None)):
        part = policy_loss(LossInputs(**{name: values[rows] for name, values in fields.items()}), loss_settings)
        for name, value in {**part.metrics, "loss": part.loss}.items():
            totals[name] += value.item()
    expected = {**whole.metrics, "loss": whole.loss}
    assert totals == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-5)


@given(batch=batches(), seed=st.integers(0, 2**31))
def test_grpo_loss_is_the_sum_of_the_quadrant_losses(batch: Batch, seed: int) -> None:
    shaping = ShapingInputs(
        batch.advantages, batch.entropies, batch.mask, batch.group_ids, batch.rewards, batch.log_probs
    )
    inputs = loss_inputs(batch, seed)

    def loss_of(advantages: Tensor) -> float:
        return policy_loss(replace(inputs, advantages=advantages), LossSettings()).loss.item()

    parts = [loss_of(shape_advantages("quadrant", shaping, only=[name])) for name in QUADRANTS]
    assert math.fsum(parts) == pytest.approx(loss_of(batch.advantages), rel=1e-5, abs=1e-6)


def test_gradient_with_respect_to_logits_is_that_of_equation_5() -> None:
    logits = torch.tensor([[0.3, -1.2, 0.9, 0.0], [1.0, 1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    sampled, advantages = torch.tensor([2, 0]), torch.tensor([1.5, -0.5], dtype=torch.float64)
    log_probs = logits.log_softmax(dim=-1)[torch.arange(2), sampled]
    mask = torch.ones(1, 2, dtype=torch.bool)
    inputs = LossInputs(log_probs[None], log_probs[None].detach(), advantages[None], mask, weights=mask.double())
    policy_loss(inputs, LossSettings()).loss.backward()
    probabilities = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    expected = [
        [a * ((v == token) - p) for v, p in enumerate(row)]
        for row, token, a in zip(probabilities, sampled.tolist(), advantages.tolist(), strict=True)
    ]
    torch.testing.assert_close(-logits.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("log_ratio", [-1e30, -150.0, 150.0, 1e30])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_log_ratios_give_finite_losses_and_gradients(log_ratio: float, advantage: float) -> None:
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=torch.zeros(1, 1),
        advantages=torch.tensor([[advantage]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        ref_log_probs=torch.zeros(1, 1),
    )
    outputs = policy_loss(inputs, LossSettings(kl_coef=0.1))
    outputs.loss.backward()
    assert all(math.isfinite(value.item()) for value in (outputs.loss, *outputs.metrics.values()))
    assert log_probs.grad.tolist() == [[0.0]]


def test_only_the_current_policy_receives_gradients() -> None:
    fields = {
        name: torch.full((1, 2), -0.5, requires_grad=True)
        for name in ("log_probs", "old_log_probs", "advantages", "entropies", "ref_log_probs", "weights")
    }
    policy_loss(LossInputs(mask=torch.ones(1, 2, dtype=torch.bool), **fields), EVERYTHING).loss.backward()
    assert [name for name, values in fields.items() if values.grad is not None] == ["log_probs", "entropies"]


def test_a_batch_without_tokens_has_loss_0_and_gradient_0() -> None:
    nothing = torch.full((2, 3), float("nan"))
    log_probs = nothing.clone().requires_grad_()
    inputs = LossInputs(log_probs, nothing, nothing, torch.zeros(2, 3, dtype=torch.bool))
    outputs = policy_loss(inputs, LossSettings())
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert torch.equal(log_probs.grad, torch.zeros(2, 3))


def test_bad_inputs_are_refused_by_name() -> None:
    tokens, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    inputs = LossInputs(tokens, tokens, tokens, mask, torch.tensor([1, 2]), tokens, tokens, tokens)
    fields = ("log_probs", "old_log_probs", "advantages", "entropies", "ref_log_probs", "weights")
    for field in fields:
        with pytest.raises(ValueError, match=f"{field} must have the mask's shape"):
            replace(inputs, **{field: torch.zeros(2, 4)})
        with pytest.raises(ValueError, match=f"{field} must be float32 or float64, got torch.bfloat16"):
            replace(inputs, **{field: tokens.bfloat16()})
        broken = replace(inputs, **{field: tokens.clone().index_fill(1, torch.tensor([1]), float("nan"))})
        with pytest.raises(ValueError, match=f"^{field} must be finite"):
            policy_loss(broken, EVERYTHING)
        assert math.isnan(policy_loss_unchecked(broken, EVERYTHING).loss)
    for field, loss_settings in (
        ("ref_log_probs", LossSettings(kl_coef=0.1)),
        ("entropies", LossSettings(entropy_coef=0.1)),
    ):
        with pytest.raises(ValueError, match=f"{field} are needed"):
            policy_loss(replace(inputs, **{field: None}), loss_settings)
    with pytest.raises(ValueError, match="group_ids are needed"):
        policy_loss(replace(inputs, group_ids=None, weights=None), LossSettings(aggregation="group_token_mean"))
    with pytest.raises(ValueError, match="mask must be boolean"):
        replace(inputs, mask=mask.long())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", "gspo2"),
        ("eps_low", 0.0),
        ("eps_high", -0.1),
        ("eps_high", float("nan")),
        ("aggregation", "mean"),
        ("kl_coef", -1.0),
        ("kl_coef", float("inf")),
        ("kl_estimator", "k4"),
        ("entropy_coef", float("nan")),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*got {value!r}"):
        LossSettings(**{field: value})  # type: ignore[arg-type]
