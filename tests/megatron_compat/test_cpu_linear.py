"""A linear layer's output and gradients beside float64, its weight's gradient summed where Megatron wants it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_megatron.megatron_compat.cpu_linear import accumulating


def of_megatron(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("not a layer of this package")


@pytest.mark.parametrize("has_bias", [False, True])
def test_micro_batches_add_up(has_bias: bool) -> None:
    """One of the micro-batches has no token, as an expert's may."""
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4), torch.randn(5) if has_bias else None
    leaves = [weight.requires_grad_(), *([bias.requires_grad_()] if bias is not None else [])]
    weight.main_grad = torch.zeros(5, 4)  # type: ignore[attr-defined]
    exact_weight, exact_bias = weight.detach().double().requires_grad_(), None
    if bias is not None:
        exact_bias = bias.detach().double().requires_grad_()
    linear = accumulating(of_megatron)

    for shape in ((7, 3), (0, 3), (1, 2)):
        states, upstream = torch.randn(*shape, 4, requires_grad=True), torch.randn(*shape, 5)
        exact_states = states.detach().double().requires_grad_()
        output = linear(states, weight, bias, False, False, False)
        exact = torch.nn.functional.linear(exact_states, exact_weight, exact_bias)
        assert output.shape == exact.shape
        torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-5)
        torch.autograd.backward(output, upstream, inputs=[states, *leaves])
        exact.backward(upstream.double())
        assert states.grad is not None
        torch.testing.assert_close(states.grad.double(), exact_states.grad, rtol=0, atol=1e-5)

    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(main_grad.double(), exact_weight.grad, rtol=0, atol=1e-5)
    if bias is not None and exact_bias is not None:
        torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["frozen", "bfloat16", "sequence parallel"])
def test_other_layers_stay_megatrons(case: str) -> None:
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    weight = torch.zeros(5, 4, dtype=dtype)
    if case != "frozen":
        weight.main_grad = torch.zeros(5, 4)  # type: ignore[attr-defined]
    asked = []

    def plain(*args: Any, **kwargs: Any) -> Tensor:
        asked.append((args, kwargs))
        return torch.zeros(2, 5)

    accumulating(plain)(torch.zeros(2, 4, dtype=dtype), weight, None, False, True, case == "sequence parallel")
    assert [args[3:] for args, _ in asked] == [(False, True, case == "sequence parallel")]
