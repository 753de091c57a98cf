"""SwiGLU, rotary positions and RMSNorm beside float64 references written here: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eapo_megatron.megatron_compat import cpu_kernels
from eapo_megatron.megatron_compat.cpu_kernels import (
    bias_swiglu,
    rms_norm,
    rotated,
    swiglu,
    weighted_bias_swiglu,
)

SHAPES = ((7, 3), (1, 5), (0, 3))  # s, b


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "CHUNK", 64)


def compare(
    new: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], fixed: tuple[Tensor, ...] = ()
) -> None:
    """Values and the gradients of `inputs`, to float32's rounding; gradcheck in float64."""
    inputs = [part.double().requires_grad_() for part in inputs]
    exact = reference(*inputs, *(part.double() for part in fixed))
    upstream = torch.randn_like(exact)
    exact_grads = torch.autograd.grad(exact, inputs, upstream)
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        own = [part.detach().to(dtype).requires_grad_() for part in inputs]
        out = new(*own, *(part.to(dtype) for part in fixed))
        grads = torch.autograd.grad(out, own, upstream.to(dtype))
        for got, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), wanted, rtol=10 * within, atol=within * 10)


def of_swiglu(both: Tensor) -> Tensor:
    gate, up = both[..., :10], both[..., 10:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    both, bias, weights = torch.randn(*shape, 20), torch.randn(20), torch.rand(*shape, 1)
    compare(swiglu, of_swiglu, [both])
    compare(bias_swiglu, lambda x, b: of_swiglu(x + b), [both, bias])
    compare(lambda x, w: weighted_bias_swiglu(x, None, w), lambda x, w: of_swiglu(x) * w, [both, weights])


@pytest.mark.parametrize("turning", [6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_positions(shape: tuple[int, int], turning: int) -> None:
    torch.manual_seed(0)
    half = turning // 2
    angles = (torch.rand(shape[0], 1, 1, half) * 6).repeat(1, 1, 1, 2)

    def reference(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        pairs = torch.complex(states[..., :half], states[..., half:turning])
        pairs = pairs * torch.complex(cosines, sines)[..., :half]
        return torch.cat([pairs.real, pairs.imag, states[..., turning:]], dim=-1)

    heads = torch.randn(*shape, 4, 16)
    compare(rotated, reference, [heads[..., ::2]], (angles.cos(), angles.sin()))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * w,
        [torch.randn(*shape, 24), torch.randn(24)],
    )
