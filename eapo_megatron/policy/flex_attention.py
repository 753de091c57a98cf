"""Attention over one packed row by torch's FlexAttention (arXiv 2412.05496): one kernel under one block mask.

The mask comes from the same spans as `segment_attention` takes. What a query sees are a few runs of keys, so blocks are
counted without a [T, S] mask, and inside of a block the kernel compares a key's place with the ends of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from eapo_megatron.policy.segment_attention import Span

BLOCK = 128


def flex_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None = None
) -> Tensor:
    """Attention of query [T, heads, d] over key [S, groups, d] and value [S, groups, dv] -> [T, heads, dv].

    A query that sees nothing gets zeros. `scale` multiplies the scores; None: d^-0.5. `heads` is a multiple of
    `groups`. On the CPU torch computes all scores, and refuses to train.
    """
    attend: Callable[..., Any] = flex_attention
    if query.is_cuda:
        attend = _compiled()
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    out: Tensor = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _compiled() -> Callable[..., Any]:
    """One kernel for packs of all lengths. `fullgraph`: it never goes back to computing all scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(
    causal: Sequence[tuple[Span, Span]],
    contexts: Sequence[tuple[Span, Span]],
    queries: int,
    keys: int,
    device: torch.device,
) -> BlockMask:
    """What `queries` places see of `keys` places by the spans of `segment_attention`, two contexts a query at most."""
    first, end = (part.to(device) for part in _runs(causal, contexts, queries))

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (first[0, query] <= key) & (key < end[0, query])
        one = (first[1, query] <= key) & (key < end[1, query])
        other = (first[2, query] <= key) & (key < end[2, query])
        return own | one | other

    starts = torch.arange(0, keys, BLOCK, dtype=torch.int32, device=device)
    seen = torch.zeros(-(-queries // BLOCK) * BLOCK, len(starts), dtype=torch.int32, device=device)
    for run_first, run_end in zip(first.unsqueeze(-1), end.unsqueeze(-1), strict=True):
        seen[:queries] += (run_end.minimum(starts + BLOCK) - run_first.maximum(starts)).clamp(min=0)
    of_blocks = seen.unflatten(0, (-1, BLOCK)).sum(1)
    complete = of_blocks == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((of_blocks > 0) & ~complete),
        *_listed(complete),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, keys),
    )


def _runs(
    causal: Sequence[tuple[Span, Span]], contexts: Sequence[tuple[Span, Span]], queries: int
) -> tuple[Tensor, Tensor]:
    """First and end of the runs of keys that each query sees: its own, one context, another; int32 [3, queries]."""
    first, end = torch.zeros(2, 3, queries, dtype=torch.int32)
    for (start, stop), (own, _) in causal:
        first[0, start:stop] = own
        end[0, start:stop] = torch.arange(own + 1, own + 1 + stop - start)
    for (start, stop), (begins, ends) in contexts:
        run = 2 if end[1, start:stop].any() else 1
        first[run, start:stop], end[run, start:stop] = begins, ends
    return first, end


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks (bool [rows, columns]) how many there are, and their columns first; int32 [1, 1, ...]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]
