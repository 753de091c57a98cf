"""What lies between a transformer's matrix products, for the CPU: SwiGLU, rotary positions and RMSNorm.

Written as chains of operations each of them takes several passes over memory, and autograd keeps what lies between
them. Here each works on a few rows at a time, whose intermediate values stay in the processor's cache, keeps its inputs
alone, and has its own backward. Values and gradients are those of the chains, up to rounding; any floating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 17  # elements of the widest operand that are worked on at a time: half a MiB in float32


def take(states: Tensor) -> bool:
    """Whether these functions are for this tensor's device: on a GPU the chains are Megatron's, torch's or fused."""
    return states.is_cpu


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 F], gate first -> [..., F]."""
    return _SwiGLU.apply(gate_and_up)


def bias_swiglu(gate_and_up: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """Megatron's `bias_swiglu_impl`; further arguments are of lower precision and offloading, which the CPU has not."""
    return swiglu(gate_and_up if bias is None else gate_and_up + bias)


def weighted_bias_swiglu(gate_and_up: Tensor, bias: Tensor | None, weights: Tensor, *_: Any) -> Tensor:
    """Megatron's `weighted_bias_swiglu_impl`, of experts: weights [..., 1] multiply what comes out."""
    return (bias_swiglu(gate_and_up, bias) * weights).to(gate_and_up.dtype)


def rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: states [s, b, heads, d] with pairs (i, i + r / 2) of the first r turned by their angles.

    `cosines` and `sines` [s, 1, 1, r] have the angles of the first half twice, as Megatron's tables; they get no
    gradient.
    """
    return _Rotary.apply(states, cosines, sines)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """states / sqrt(mean of squares + eps) * weight over the last dimension; weight [H], both of one dtype."""
    return _RMSNorm.apply(states, weight, eps)


def _rows(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every part, a few at a time; all are [N, ...]."""
    size = max(CHUNK // max(math.prod(part.shape[1:]) for part in parts), 1)
    yield from zip(*(part.split(size) for part in parts), strict=True)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        *rows, width = gate_and_up.shape
        out = gate_and_up.new_empty(*rows, width // 2)
        for both, result in _rows(gate_and_up.reshape(-1, width), out.view(-1, width // 2)):
            gate, up = both.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:  # type: ignore[override]
        (gate_and_up,) = ctx.saved_tensors
        width = gate_and_up.shape[-1]
        grad = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
        flat = (part.reshape(-1, part.shape[-1]) for part in (gate_and_up, grad_out))
        for both, upstream, result in _rows(*flat, grad.view(-1, width)):
            gate, up = both.chunk(2, dim=-1)
            of_gate, of_up = result.chunk(2, dim=-1)
            torch.mul(upstream, F.silu(gate), out=of_up)
            torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=of_gate)
        return grad


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(states, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        return _turned(grad_out, cosines, sines, -1), None, None


def _turned(states: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    """By the angles, or against them: what turns back is the transpose."""
    out = torch.empty_like(states, memory_format=torch.contiguous_format)
    turning, half = cosines.shape[-1], cosines.shape[-1] // 2
    for part, cos, sin, result in _rows(states, cosines[..., :half], sines[..., :half], out):
        first, second = part[..., :half], part[..., half:turning]
        torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-direction)
        torch.mul(second, cos, out=result[..., half:turning]).addcmul_(first, sin, value=direction)
        if turning < part.shape[-1]:
            result[..., turning:] = part[..., turning:]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
        width = states.shape[-1]
        flat = states.reshape(-1, width)
        scales = states.new_empty(len(flat), 1)
        for part, scale, result in _rows(flat, scales, out.view(-1, width)):
            torch.mean(part * part, dim=-1, keepdim=True, out=scale).add_(eps).rsqrt_()
            torch.mul(part, scale, out=result).mul_(weight)
        ctx.save_for_backward(states, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """With n = states * scale: of states scale (g w - n mean(n g w)), of the weight the sum of g n."""
        states, weight, scales = ctx.saved_tensors
        width = states.shape[-1]
        grad = torch.empty_like(states, memory_format=torch.contiguous_format)
        of_weight = torch.zeros_like(weight)
        flat = (part.reshape(-1, width) for part in (states, grad_out))
        for part, upstream, scale, result in _rows(*flat, scales, grad.view(-1, width)):
            normed = part * scale
            product = normed * upstream
            of_weight += product.sum(dim=0)
            shared = torch.mv(product, weight).div_(-width).unsqueeze(-1)
            torch.mul(upstream, weight, out=result).addcmul_(normed, shared).mul_(scale)
        return grad, of_weight, None
