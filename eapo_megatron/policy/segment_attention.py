"""Attention over one packed row, piece by piece: spans that see themselves causally, some of which see contexts too.

No mask is made. Each span goes through torch's flash kernel, and once more, together with the spans beside it, against
each context that they share. Two results merge by their log-sum-exps,

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,

and in backward each part gets the merged output and lse, with which the kernel's own formula gives its share of the
gradients (as in ring attention, arXiv 2310.01889). On GPUs the kernel takes bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Span: TypeAlias = tuple[int, int]  # places of a row: from the first, up to but without the second

aten = torch.ops.aten


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: Sequence[tuple[Span, Span]],
    contexts: Sequence[tuple[Span, Span]],
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of query [T, heads, d] over key [S, groups, d] and value [S, groups, dv] -> [T, heads, dv].

    `causal`: spans of queries without overlap, none of them empty, each with the span of their own keys, which they see
    causally. `contexts`: spans of queries from among them, with a span of keys, all of which they see too. A query in
    no span gets zeros. `scale` multiplies the scores; None: d^-0.5. `heads` is a multiple of `groups`; the dtype is any
    floating one on the CPU, bfloat16 on a GPU.
    """
    size, value_size = query.shape[-1], value.shape[-1]
    scale = size**-0.5 if scale is None else scale
    width = max(size, value_size)  # the kernel wants one head size, on GPUs a multiple of 8
    width = -(-width // 8) * 8 if query.is_cuda else width
    if size == value_size == width:
        return _SegmentAttention.apply(query, key, value, causal, contexts, scale)
    query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
    out: Tensor = _SegmentAttention.apply(query, key, value, causal, contexts, scale)
    return out[..., :value_size]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: Sequence[tuple[Span, Span]],
        contexts: Sequence[tuple[Span, Span]],
        scale: float,
    ) -> Tensor:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = query.new_zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys in causal:
            arguments = _laid(query, queries), _laid(key, keys), _laid(value, keys)
            own, own_lse = _flash(*arguments, True, scale)
            _laid(out, queries).copy_(own)
            lse[slice(*queries)] = own_lse[0].T
        for queries, keys in contexts:
            arguments = _laid(query, queries), _laid(key, keys), _laid(value, keys)
            other, other_lse = _flash(*arguments, False, scale)
            own, own_lse = _laid(out, queries), lse[slice(*queries)].T[None]
            merged = torch.logaddexp(own_lse, other_lse)
            share, other_share = ((part - merged).exp()[..., None] for part in (own_lse, other_lse))
            own.copy_(share * own + other_share * other)
            lse[slice(*queries)] = merged[0].T
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans, ctx.scale = (causal, contexts), scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        causal, contexts = ctx.spans
        grad_out = grad_out.contiguous()
        grads = tuple(torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (query, key, value))
        parts = [(*spans, True) for spans in causal] + [(*spans, False) for spans in contexts]
        for queries, keys, is_causal in parts:
            of_part = _flash_backward(
                _laid(grad_out, queries),
                _laid(query, queries),
                _laid(key, keys),
                _laid(value, keys),
                _laid(out, queries),
                lse[slice(*queries)].T[None],
                is_causal,
                ctx.scale,
            )
            for grad, span, added in zip(grads, (queries, keys, keys), of_part, strict=True):
                _laid(grad, span).add_(added)
        return (*grads, None, None, None)


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of torch's flash kernel for [1, heads, length, d], without dropout."""
    if query.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        return out, lse
    pair: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return pair


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    parts = grad_out, query, key, value, out
    grads: tuple[Tensor, ...]
    if query.is_cuda:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)  # its random state, which is not read
        lse = lse.contiguous()  # the kernel goes through its memory in order
        lengths = None, None, query.shape[2], key.shape[2]
        grads = aten._scaled_dot_product_flash_attention_backward(
            *parts, lse, *lengths, 0.0, is_causal, no_dropout, no_dropout, scale=scale
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, lse, 0.0, is_causal, scale=scale)
    return grads


def _laid(part: Tensor, span: Span) -> Tensor:
    """A span of [T, heads, d] as the kernel takes it, [1, heads, length, d]: a view."""
    return part[slice(*span)].transpose(0, 1)[None]
