"""Every method on two ranks equals one rank; the reference policy under every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eapo_megatron.config import METHODS
from hf_reference import cost_of_float32
from layouts import LAYOUTS

Measured = Callable[[str], dict[str, Any]]
MEASURED = [name for name, layout in LAYOUTS.items() if layout.methods]
SPLIT = [name for name in MEASURED if name != "single"]
QUADRANTS = ("phr", "plr", "nhr", "nlr")
MARGIN = 8  # times the error of float32, as for gradients of every layout


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_one_rank(name: str, method: str, measured: Measured) -> None:
    whole, actual = (measured(layout)["methods"][method] for layout in ("single", name))
    assert actual["metrics"].keys() == whole["metrics"].keys()
    for key, value in whole["metrics"].items():
        assert actual["metrics"][key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    assert actual["gradients"].keys() == whole["gradients"].keys()
    share = MARGIN * cost_of_float32("tied")
    assert share < 3e-4, "a gradient that is off by a thousandth would pass"
    largest = max(float(gradient.abs().max()) for gradient in whole["gradients"].values())
    assert largest > 0
    for key, gradient in whole["gradients"].items():
        assert (actual["gradients"][key] - gradient).abs().max() <= share * gradient.abs().max(), key


@pytest.mark.parametrize("name", MEASURED)
def test_the_methods_differ(name: str, measured: Measured) -> None:
    found = measured(name)["methods"]
    key = "model.layers.0.mlp.down_proj.weight"
    gradients = {method: found[method]["gradients"][key] for method in METHODS}
    # Of one clip range and one estimator: what else DAPO has is in rewards and sampling.
    del gradients["rloo"]  # for groups of one size a multiple of Dr.GRPO's
    for one in gradients:
        for other in gradients:
            assert one == other or not torch.allclose(gradients[one], gradients[other], rtol=1e-3, atol=0), (one, other)


@pytest.mark.parametrize("name", MEASURED)
def test_quadrant_losses_and_gradients_sum_to_grpos(name: str, measured: Measured) -> None:
    found = measured(name)["methods"]
    whole = found["dapo"]  # GRPO's loss at the quadrants' clip range
    loss = sum(found[quadrant]["metrics"]["loss/policy"] for quadrant in QUADRANTS)
    assert loss == pytest.approx(whole["metrics"]["loss/policy"], abs=1e-6)
    for key, gradient in whole["gradients"].items():
        total = sum(found[quadrant]["gradients"][key].double() for quadrant in QUADRANTS)
        torch.testing.assert_close(total, gradient.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEASURED)
def test_the_reference_policy_is_the_policy_of_the_start(name: str, measured: Measured) -> None:
    found = measured(name)["methods"]
    assert found["same weights"]
    # Products of the same numbers at other addresses round in another order.
    torch.testing.assert_close(found["reference"], found["at start"], rtol=1e-5, atol=1e-5)
    assert not found["holds gradients"]
    torch.testing.assert_close(found["reference"], measured("single")["methods"]["reference"], rtol=1e-4, atol=1e-5)
    assert found["grpo"]["metrics"]["loss/kl"] > 0.1  # the weights of the two differ


@pytest.mark.parametrize("name", MEASURED)
def test_scores_before_an_update_are_those_of_its_rows(name: str, measured: Measured) -> None:
    expected, actual = measured(name)["methods"]["scores of rows"]
    for of_batch, of_rows in zip(expected, actual, strict=True):
        torch.testing.assert_close(of_rows, of_batch, rtol=1e-5, atol=1e-6)
