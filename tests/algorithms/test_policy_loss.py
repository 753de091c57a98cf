from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_batches import Batch, batches
from torch import Tensor

from eapo_megatron.algorithms import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    QUADRANTS,
    THRESHOLDS,
    LossInputs,
    LossSettings,
    ShapingInputs,
    loss_weights,
    policy_loss,
    policy_loss_unchecked,
    shape_advantages,
)

EVERYTHING = LossSettings(kl_coef=0.3, entropy_coef=0.05)
TOKEN_FIELDS = (
    "log_probs",
    "old_log_probs",
    "advantages",
    "entropies",
    "ref_log_probs",
    "weights",
    "rollout_log_probs",
    "corrections",
    "selected",
)


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


@dataclass(frozen=True)
class Sum:
    """Of weights times values, in float64, and of their absolute values, which rounding errors are shares of."""

    value: float = 0.0
    size: float = 0.0

    def plus(self, weight: float, value: float, size: float) -> Sum:
        return Sum(self.value + weight * value, self.size + weight * size)


# A token's value passes through at most 16 roundings of float32 and then through a sum of at most 9 x 6 of them.
ROUNDING = (16 + 9 * 6) * 2.0**-24


def near(sums: dict[str, Sum]) -> dict[str, object]:
    return {name: pytest.approx(sum.value, rel=0, abs=ROUNDING * sum.size) for name, sum in sums.items()}


def clip_range(loss_settings: LossSettings) -> tuple[float, float]:
    return 1 - loss_settings.options["eps_low"], 1 + loss_settings.options["eps_high"]


def reference_terms(inputs: LossInputs, loss_settings: LossSettings, i: int, t: int) -> dict[str, tuple[float, float]]:
    """The token's value and size of every term and metric, and of the derivative of its loss, by the math module."""
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
    log_ratio, to_ref = log_prob - old, ref - log_prob
    ratio = math.exp(log_ratio)
    # A rounded logarithm is off by its own size, and so is what exp makes of it, relative to itself.
    of_ratio, of_ref = (math.exp(value) * (1 + abs(value)) + 1 + abs(value) for value in (log_ratio, to_ref))
    if loss_settings.loss == "negative_log_likelihood":
        terms = {"loss/policy": (-log_prob, abs(log_prob))}
        slope, of_slope = -1.0, 1.0
    else:
        low, high = clip_range(loss_settings)
        clipped_low, clipped_high = ratio < low and advantage < 0, ratio > high and advantage > 0
        of_slope = abs(advantage) * of_ratio
        terms = {
            "loss/policy": (-min(ratio * advantage, min(max(ratio, low), high) * advantage), of_slope),
            "clip_fraction/low": (float(clipped_low), 1.0),
            "clip_fraction/high": (float(clipped_high), 1.0),
            "kl/old_policy": (ratio - 1 - log_ratio, of_ratio),
            "ratio/mean": (ratio, of_ratio),
        }
        slope = 0.0 if clipped_low or clipped_high else -ratio * advantage
    kl, kl_slope, of_kl = {
        "k1": (-to_ref, 1.0, abs(to_ref)),
        "k2": (to_ref**2 / 2, -to_ref, to_ref**2 + abs(to_ref)),
        "k3": (math.exp(to_ref) - 1 - to_ref, 1 - math.exp(to_ref), of_ref),
    }[loss_settings.kl_estimator]
    loss, of_loss = terms["loss/policy"]
    if loss_settings.kl_coef:
        terms["loss/kl"] = kl, of_kl
        loss, of_loss = loss + loss_settings.kl_coef * kl, of_loss + loss_settings.kl_coef * of_kl
        slope, of_slope = slope + loss_settings.kl_coef * kl_slope, of_slope + loss_settings.kl_coef * (1 + of_kl)
    if loss_settings.entropy_coef:
        terms["loss/entropy"] = entropy, abs(entropy)
        loss, of_loss = loss - loss_settings.entropy_coef * entropy, of_loss + loss_settings.entropy_coef * abs(entropy)
    return {**terms, "loss": (loss, of_loss), "slope": (slope, of_slope)}


def reference_sums(inputs: LossInputs, loss_settings: LossSettings) -> tuple[dict[str, Sum], Tensor, Tensor]:
    """The loss and its metrics, and the gradient of log_probs with its sizes [N, T]."""
    weights = loss_weights(inputs.mask, inputs.group_ids, aggregation=loss_settings.aggregation).double()
    sums: dict[str, Sum] = {}
    gradient, size = torch.zeros(2, *inputs.mask.shape, dtype=torch.float64)
    for i, t in inputs.mask.nonzero().tolist():
        weight, terms = float(weights[i, t]), reference_terms(inputs, loss_settings, i, t)
        gradient[i, t], size[i, t] = (weight * value for value in terms.pop("slope"))
        sums = {name: sums.get(name, Sum()).plus(weight, *value) for name, value in terms.items()}
    return sums, gradient, size


def assume_no_ratio_at_an_edge(inputs: LossInputs, loss_settings: LossSettings) -> None:
    """There the last bit decides whether a token has a gradient."""
    ratios = (inputs.log_probs - inputs.old_log_probs).detach()[inputs.mask].double().exp()
    if loss_settings.loss != "clipped_surrogate":
        return
    edges = torch.tensor(clip_range(loss_settings), dtype=torch.float64)
    assume(bool(((ratios[:, None] - edges).abs() > 1e-5).all()))


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
    options = {"eps_low": 0.1, "eps_high": 0.4} if named["loss"] == "clipped_surrogate" else {}
    loss_settings = LossSettings(**named, **options)
    inputs = loss_inputs(batch, seed)
    assume_no_ratio_at_an_edge(inputs, loss_settings)
    outputs = policy_loss(inputs, loss_settings)
    log_prob_gradient, entropy_gradient = torch.autograd.grad(
        outputs.loss, (inputs.log_probs, inputs.entropies), materialize_grads=True
    )
    actual = {"loss": outputs.loss.item()} | {name: value.item() for name, value in outputs.metrics.items()}
    sums, gradient, size = reference_sums(inputs, loss_settings)
    assert actual == near(sums or dict.fromkeys(actual, Sum()))
    assert ((log_prob_gradient.double() - gradient).abs() <= ROUNDING * size).all()
    weights = loss_weights(batch.mask, batch.group_ids, aggregation=loss_settings.aggregation)
    expected = -loss_settings.entropy_coef * weights.double()
    torch.testing.assert_close(entropy_gradient.double(), expected, rtol=ROUNDING, atol=0)
    assert not any(value.requires_grad for value in outputs.metrics.values())


@given(batch=batches(min_responses=2), seed=st.integers(0, 2**31), aggregation=st.sampled_from(sorted(AGGREGATIONS)))
def test_micro_batches_add_up_to_the_whole(batch: Batch, seed: int, aggregation: str) -> None:
    loss_settings = replace(EVERYTHING, aggregation=aggregation)
    inputs = loss_inputs(batch, seed)
    assume_no_ratio_at_an_edge(inputs, loss_settings)
    weights = loss_weights(batch.mask, batch.group_ids, aggregation=aggregation)
    sums, _, _ = reference_sums(inputs, loss_settings)
    totals = dict.fromkeys([*policy_loss(inputs, loss_settings).metrics, "loss"], 0.0)
    fields = {"mask": inputs.mask, "group_ids": inputs.group_ids, **inputs.token_fields(), "weights": weights}
    for rows in (slice(0, 1), slice(1, None)):
        part = policy_loss(LossInputs(**{name: values[rows] for name, values in fields.items()}), loss_settings)
        for name, value in {**part.metrics, "loss": part.loss}.items():
            totals[name] += value.item()
    assert totals == near(sums or dict.fromkeys(totals, Sum()))


@given(batch=batches(), seed=st.integers(0, 2**31))
def test_grpo_loss_is_the_sum_of_the_quadrant_losses(batch: Batch, seed: int) -> None:
    shaping = ShapingInputs(
        batch.advantages, batch.entropies, batch.mask, batch.group_ids, batch.rewards, batch.log_probs
    )
    inputs = loss_inputs(batch, seed)

    assume_no_ratio_at_an_edge(inputs, LossSettings())

    def loss_of(advantages: Tensor) -> tuple[float, Tensor]:
        loss = policy_loss(replace(inputs, advantages=advantages), LossSettings()).loss
        return loss.item(), torch.autograd.grad(loss, inputs.log_probs)[0].double()

    for threshold in THRESHOLDS:
        of_threshold = replace(shaping, quadrant_threshold=threshold)
        parts = [loss_of(shape_advantages("quadrant", of_threshold, only=[name])) for name in QUADRANTS]
        sums, gradient, size = reference_sums(inputs, LossSettings())
        assert {"loss": math.fsum(loss for loss, _ in parts)} == near({"loss": sums.get("loss", Sum())})
        total = sum(part for _, part in parts)
        assert ((total - gradient).abs() <= ROUNDING * size).all()


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
    fields = {name: torch.full((1, 2), -0.5, requires_grad=True) for name in TOKEN_FIELDS}
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
    inputs = LossInputs(mask=mask, group_ids=torch.tensor([1, 2]), **dict.fromkeys(TOKEN_FIELDS, tokens))
    for field in TOKEN_FIELDS:
        with pytest.raises(ValueError, match=f"{field} must have the mask's shape"):
            replace(inputs, **{field: torch.zeros(2, 4)})
        with pytest.raises(ValueError, match=f"{field} must be float32 or float64, got torch.bfloat16"):
            replace(inputs, **{field: tokens.bfloat16()})
        broken = replace(inputs, **{field: tokens.clone().index_fill(1, torch.tensor([1]), float("nan"))})
        with pytest.raises(ValueError, match=f"^{field} must be finite"):
            policy_loss(broken, EVERYTHING)
        if field not in ("rollout_log_probs", "selected"):  # which this loss does not read
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
        ("eps_low", 1.0),
        ("eps_low", "much"),
        ("eps_low", True),
        ("kl_coef", "much"),
        ("eps_high", float("inf")),
        ("dual_clip", 1.0),
        ("dual_clip", float("nan")),
        ("eps_high", -0.1),
        ("eps_high", float("nan")),
        ("aggregation", "mean"),
        ("kl_coef", -1.0),
        ("kl_coef", float("inf")),
        ("kl_estimator", "k4"),
        ("entropy_coef", float("nan")),
        ("entropy_target", -0.2),
        ("entropy_coef_step", float("inf")),
        ("aggregation_length", 0),
        ("aggregation_length", 2.0),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*got {value!r}"):
        LossSettings(**{field: value})  # type: ignore[arg-type]


def test_settings_hold_the_losses_options_and_no_others() -> None:
    assert LossSettings() == LossSettings(eps_low=0.2, eps_high=0.28)
    assert LossSettings("negative_log_likelihood").options == {}
    changed = replace(LossSettings(eps_high=0.3), aggregation="group_token_mean", eps_low=0.1)
    assert changed.options == {"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 0.0}
    assert changed.aggregation == "group_token_mean"
    assert pickle.loads(pickle.dumps(changed)) == changed
    for arguments, message in (
        ({"eps_lo": 0.2}, r"^eps_lo is not a key of the loss .* \(did you mean eps_low\?\): .* eps_high, dual_clip$"),
        ({"loss": "negative_log_likelihood", "eps_low": 0.2}, "^eps_low is not a key of the loss 'negative_log_lik"),
    ):
        with pytest.raises(ValueError, match=message):
            LossSettings(**arguments)
    with pytest.raises(FrozenInstanceError):
        changed.kl_coef = 0.1  # type: ignore[misc]
