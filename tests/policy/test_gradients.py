"""Gradients, gradient norms and weights after optimizer steps: every layout against EAPO on a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_reference import reference_of, tensors_of
from layouts import DECAY_STEPS, FLOAT32, LAYOUTS, MINI_BATCHES, OPTIMIZERS

Measured = Callable[[str], dict[str, Any]]
SHARDED = [name for name in LAYOUTS if name.endswith(", distributed optimizer")]


def largest(tensors: dict[str, Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors.values())


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return largest({name: actual[name].double() - expected[name].double() for name in expected})


@pytest.mark.parametrize("name", FLOAT32)
def test_gradients(name: str, measured: Measured) -> None:
    loss, gradients = reference_of(LAYOUTS[name].model).gradients()
    actual = measured(name)
    assert actual["loss"] == pytest.approx(loss, abs=1e-6)
    assert largest_difference(actual["gradients"], gradients) < 1e-5 * largest(gradients)
    for tensor, expected in gradients.items():
        assert (actual["gradients"][tensor] - expected).abs().max() <= 5e-5 * expected.abs().max(), tensor


@pytest.mark.parametrize("name", FLOAT32)
def test_gradient_norms_of_consecutive_steps(name: str, measured: Measured) -> None:
    norms, _ = reference_of(LAYOUTS[name].model).steps(LAYOUTS[name].optimizer)
    assert measured(name)["norms"] == pytest.approx(norms, rel=2e-5)


@pytest.mark.parametrize("name", FLOAT32)
def test_weights_move_as_the_reference_under_consecutive_steps(name: str, measured: Measured) -> None:
    layout = LAYOUTS[name]
    reference = reference_of(layout.model)
    start = tensors_of(reference.model, lambda tensor: tensor)
    _, weights = reference.steps(layout.optimizer)
    expected = {key: weights[key] - start[key] for key in start}
    actual = {key: tensor.double() - start[key] for key, tensor in measured(name)["weights"].items()}
    # Adam divides by the gradient's own size, which magnifies the rounding of small elements.
    tolerance = 1e-5 if OPTIMIZERS[layout.optimizer]["name"] == "sgd" else 3e-4
    assert largest_difference(actual, expected) < tolerance * largest(expected)


@pytest.mark.parametrize("name", SHARDED)
def test_distributed_optimizer_takes_the_same_steps(name: str, measured: Measured) -> None:
    plain = measured(name.removesuffix(", distributed optimizer"))
    actual = measured(name)
    assert actual["norms"] == pytest.approx(plain["norms"], rel=5e-6)
    assert largest_difference(actual["weights"], plain["weights"]) < 1e-6 * largest(plain["weights"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_applied_and_move_the_schedule(name: str, measured: Measured) -> None:
    lr = OPTIMIZERS[LAYOUTS[name].optimizer]["lr"]
    actual = measured(name)
    assert actual["applied"] == [True] * len(MINI_BATCHES)
    assert actual["lrs"] == pytest.approx([lr * (1 - step / DECAY_STEPS) for step in range(len(MINI_BATCHES))])


@pytest.mark.parametrize("fault", ["NaN loss", "Inf gradient"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_step_with_nan_or_inf_is_refused_and_changes_nothing(name: str, fault: str, measured: Measured) -> None:
    assert measured(name)["refused"][fault] == {"refused": True, "weights": True, "moments": True, "schedule": True}


def test_bfloat16_is_near_float32(measured: Measured) -> None:
    loss, _ = reference_of("tied").gradients()
    norms, _ = reference_of("tied").steps("sgd")
    actual = measured("single, bfloat16")
    assert actual["loss"] == pytest.approx(loss, abs=0.02)
    assert actual["norms"][0] == pytest.approx(norms[0], rel=0.1)
