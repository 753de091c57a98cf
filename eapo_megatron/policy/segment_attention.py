"""Attention over one packed row on the CPU: spans that see themselves causally, some of which see contexts too.

No mask is made. Each span goes through torch's flash kernel, and once more, together with the spans beside it, against
each context that they share. Two results merge by their log-sum-exps,

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,

and in backward each part gets the merged output and lse, with which the kernel's own formula gives its share of the
gradients (as in ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Span: TypeAlias = tuple[int, int]  # places of a row: from the first, up to but without the second

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    floating one.
    """
    size, value_size = query.shape[-1], value.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if size == value_size:
        return _SegmentAttention.apply(query, key, value, causal, contexts, scale)
    width = max(size, value_size)  # the kernel wants one head size
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
            own, own_lse = _flash(*arguments, 0.0, True, scale=scale)
            _laid(out, queries).copy_(own)
            lse[slice(*queries)] = own_lse[0].T
        for queries, keys in contexts:
            arguments = _laid(query, queries), _laid(key, keys), _laid(value, keys)
            other, other_lse = _flash(*arguments, 0.0, False, scale=scale)
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
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            for grad, span, added in zip(grads, (queries, keys, keys), of_part, strict=True):
                _laid(grad, span).add_(added)
        return (*grads, None, None, None)


def _laid(part: Tensor, span: Span) -> Tensor:
    """A span of [T, heads, d] as the kernel takes it, [1, heads, length, d]: a view."""
    return part[slice(*span)].transpose(0, 1)[None]
