"""A linear layer of Megatron's on the CPU: its products by the faster library, its weight's gradient summed in place.

Megatron's own multiplies by `torch.matmul`, and on the CPU makes a gradient of the weight in each micro-batch that is
then added to `main_grad`. Layers in other types than float32, frozen ones and sequence parallelism stay Megatron's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from eapo_megatron.vocab_parallel.products import add_product, product


def accumulating(of_megatron: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place of Megatron's `linear_with_grad_accumulation_and_async_allreduce`."""

    @functools.wraps(of_megatron)
    def linear(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        *args: Any,
        tp_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Tensor:
        own = input.dtype == weight.dtype == torch.float32 and hasattr(weight, "main_grad") and not sequence_parallel
        if own:
            return _Linear.apply(input, weight, bias, tp_group if allreduce_dgrad else None)
        settings = (gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel)
        return of_megatron(input, weight, bias, *settings, *args, tp_group=tp_group, **kwargs)

    return linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, summed_over: dist.ProcessGroup | None
    ) -> Tensor:
        """input [..., H] and weight [C, H] -> [..., C]; the input's gradient is summed over a group."""
        ctx.save_for_backward(input, weight)
        ctx.summed_over, ctx.has_bias = summed_over, bias is not None
        output = product(input.reshape(-1, input.shape[-1]), weight.T)
        if bias is not None:
            output += bias
        return output.view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        upstream = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = product(upstream, weight)
        if ctx.summed_over is not None:
            handle = dist.all_reduce(grad_input, group=ctx.summed_over, async_op=True)
        add_product(weight.main_grad, upstream.T, input.reshape(-1, input.shape[-1]))
        weight.grad_added_to_main_grad = True
        grad_bias = upstream.sum(dim=0) if ctx.has_bias else None
        if ctx.summed_over is not None:
            handle.wait()
        # Megatron's hook wants a gradient of the weight, and leaves it out of main_grad.
        return grad_input.view_as(input), torch.empty_like(weight), grad_bias, None
