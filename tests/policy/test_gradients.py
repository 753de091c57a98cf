"""Gradients, their norms and optimizer steps of every layout against EAPO on a Hugging Face model, in float64.

An optimizer step magnifies rounding: Adam divides by the gradient's own size. So every step is compared where it
begins: gradients at the very weights that the layout had, the step with the very gradients that it took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_reference import cost_of_float32, reference_of
from layouts import DECAY_STEPS, FLOAT32, LAYOUTS, MINI_BATCHES, OPTIMIZERS

Measured = Callable[[str], dict[str, Any]]
UNIT = 2.0**-24  # the unit roundoff of float32
# A layout adds in another order than transformers, and has more tensors to find a larger error in: on AMD processors
# at most 2 times the error of transformers in float32, with AVX-512, AVX2 and neither.
MARGIN = 8
BETAS = (0.9, 0.999)


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    assert actual.keys() == expected.keys()
    share = MARGIN * cost_of_float32(model)
    assert share < 3e-4, "a gradient that is off by a thousandth would pass"
    for name, exact in expected.items():
        assert (actual[name] - exact).abs().max() <= share * exact.abs().max(), name


@pytest.mark.parametrize("name", FLOAT32)
def test_gradients(name: str, measured: Measured) -> None:
    reference, actual = reference_of(LAYOUTS[name].model), measured(name)
    loss, gradients = reference.gradients_at_start(tuple(range(reference.batch.size)), "token_mean")
    assert actual["loss"] == pytest.approx(loss, abs=1e-6)
    assert_gradients(actual["gradients"], gradients, LAYOUTS[name].model)


@pytest.mark.parametrize("name", [name for name in FLOAT32 if LAYOUTS[name].head == "logits"])
def test_gradients_over_kept_tokens_when_every_token_is(name: str, measured: Measured) -> None:
    reference, actual = reference_of(LAYOUTS[name].model), measured(name)
    _, gradients = reference.gradients_at_start(tuple(range(reference.batch.size)), "token_mean")
    assert_gradients(actual["gradients, every token kept"], gradients, LAYOUTS[name].model)


@pytest.mark.parametrize("name", FLOAT32)
def test_gradients_of_consecutive_steps(name: str, measured: Measured) -> None:
    reference, actual = reference_of(LAYOUTS[name].model), measured(name)
    first, *later = actual["steps"]
    assert all(torch.equal(first["weights"][key], tensor.float()) for key, tensor in reference.start.items())
    rows, aggregation = MINI_BATCHES[0]
    _, gradients = reference.gradients_at_start(tuple(rows), aggregation)
    assert_gradients(first["gradients"], gradients, LAYOUTS[name].model)
    for (rows, aggregation), step in zip(MINI_BATCHES[1:], later, strict=True):
        _, gradients = reference.gradients(rows, aggregation, step["weights"])
        assert_gradients(step["gradients"], gradients, LAYOUTS[name].model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_norms(name: str, measured: Measured) -> None:
    for step in measured(name)["steps"]:
        terms = sum(gradient.numel() for gradient in step["gradients"].values())
        # Roundings of a sum of n terms add up as sqrt(n) (Higham and Mary 2019); six times that is never seen.
        assert step["norm"] == pytest.approx(norm_of(step["gradients"]), rel=6 * terms**0.5 * UNIT)


def norm_of(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients.values())) ** 0.5


@pytest.mark.parametrize("name", FLOAT32)
def test_weights_after_consecutive_steps(name: str, measured: Measured) -> None:
    actual = measured(name)
    assert actual["weights"].keys() == reference_of(LAYOUTS[name].model).start.keys()
    assert_steps(actual["steps"], actual["weights"], LAYOUTS[name].optimizer)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.continues])
def test_a_checkpoint_goes_on_under_another_layout(name: str, measured: Measured) -> None:
    """The moments are those of the steps before, which another layout took and saved."""
    origin, actual = measured(str(LAYOUTS[name].continues)), measured(name)
    loaded, saved = actual["later steps"][0]["weights"], origin["weights"]
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    assert_steps(origin["steps"] + actual["later steps"], actual["later weights"], LAYOUTS[name].optimizer)


Steps = list[tuple[Tensor, Tensor]]


def assert_steps(steps: list[dict[str, Any]], last: Mapping[str, Tensor], optimizer: str) -> None:
    """Each step from the weights, gradient and norm that it began with; moments from the gradients before."""
    for key in last:
        weights = [step["weights"][key].double() for step in steps] + [last[key].double()]
        if key not in steps[0]["gradients"]:  # a buffer
            assert all(torch.equal(weights[0], later) for later in weights[1:]), key
            continue
        gradients, norms = [step["gradients"][key].double() for step in steps], [step["norm"] for step in steps]
        steps_of = {"adam": adam_steps, "sgd": sgd_steps}[OPTIMIZERS[optimizer]["name"]]
        expected = steps_of(OPTIMIZERS[optimizer], weights[:-1], gradients, norms)
        for number, (after, (exact, error)) in enumerate(zip(weights[1:], expected, strict=True)):
            assert ((after - exact).abs() <= error).all(), f"{key} after step {number}"


def adam_steps(
    settings: Mapping[str, Any], weights: list[Tensor], gradients: list[Tensor], norms: list[float]
) -> Steps:
    """Weights after each step of AdamW (Loshchilov and Hutter 2019), and bounds of their rounding errors in float32."""
    first, size, second = (torch.zeros_like(weights[0]) for _ in range(3))
    steps = []
    for step, (weight, gradient, norm) in enumerate(zip(weights, gradients, norms, strict=True)):
        gradient = gradient * min(1.0, settings["clip_grad"] / (norm + 1e-6))
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        size = BETAS[0] * size + (1 - BETAS[0]) * gradient.abs()
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        corrections = [1 - beta ** (step + 1) for beta in BETAS]
        rate = settings["lr"] * (1 - step / DECAY_STEPS) / corrections[0]
        divisor = (second / corrections[1]).sqrt() + settings["adam_eps"]
        decay = rate * corrections[0] * settings["weight_decay"] * decays(weight)
        # At most 24 roundings between a gradient and its part of the step, four of the weight.
        error = 24 * UNIT * rate * size / divisor + 4 * UNIT * weight.abs()
        steps.append(((1 - decay) * weight - rate * first / divisor, error))
    return steps


def sgd_steps(settings: Mapping[str, Any], weights: list[Tensor], gradients: list[Tensor], norms: list[float]) -> Steps:
    """Weights after each step with momentum and decay in the gradient, and bounds of their rounding errors."""
    velocity, size = torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
    steps = []
    for step, (weight, gradient, norm) in enumerate(zip(weights, gradients, norms, strict=True)):
        gradient = gradient * min(1.0, settings["clip_grad"] / (norm + 1e-6))
        decay = settings["weight_decay"] * decays(weight) * weight
        velocity = settings.get("sgd_momentum", 0) * velocity + gradient + decay
        size = settings.get("sgd_momentum", 0) * size + gradient.abs() + decay.abs()
        rate = settings["lr"] * (1 - step / DECAY_STEPS)
        steps.append((weight - rate * velocity, 24 * UNIT * rate * size + 4 * UNIT * weight.abs()))
    return steps


def decays(weight: Tensor) -> bool:
    """Norms and biases do not."""
    return weight.dim() > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_applied_and_move_the_schedule(name: str, measured: Measured) -> None:
    lr = OPTIMIZERS[LAYOUTS[name].optimizer]["lr"]
    actual = measured(name)
    assert [step["applied"] for step in actual["steps"]] == [True] * len(MINI_BATCHES)
    expected = [lr * (1 - step / DECAY_STEPS) for step in range(len(MINI_BATCHES))]
    assert [step["lr"] for step in actual["steps"]] == pytest.approx(expected)


@pytest.mark.parametrize("fault", ["NaN loss", "Inf gradient"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_step_with_nan_or_inf_is_refused_and_changes_nothing(name: str, fault: str, measured: Measured) -> None:
    assert measured(name)["refused"][fault] == {"refused": True, "weights": True, "moments": True, "schedule": True}


def test_bfloat16_is_near_float32(measured: Measured) -> None:
    reference, actual = reference_of("tied"), measured("single, bfloat16")
    loss, _ = reference.gradients_at_start(tuple(range(reference.batch.size)), "token_mean")
    _, gradients = reference.gradients_at_start(tuple(MINI_BATCHES[0][0]), MINI_BATCHES[0][1])
    assert actual["loss"] == pytest.approx(loss, abs=0.02)
    assert actual["steps"][0]["norm"] == pytest.approx(norm_of(gradients), rel=0.1)
