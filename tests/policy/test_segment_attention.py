"""Attention over ragged pieces of a packed row against dense masked attention in float64."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eapo_megatron.policy.segment_attention import Span, segment_attention

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax of all scores under a mask [T, S], True where a key is seen; rows that see nothing give zeros."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value)


class Row(NamedTuple):
    """Some or all of a row's places as queries, with the spans of their keys among all places."""

    length: int
    queries: list[int]  # their places in the row
    causal: list[tuple[Span, Span]]
    contexts: list[tuple[Span, Span]]


def random_row(source: random.Random) -> Row:
    """Prompts, each followed by its responses, of which some have no tokens of their own; then unused places.

    Of some of them only the last tokens are queries.
    """
    row = Row(0, [], [], [])
    length = 0

    def add(size: int) -> None:
        nonlocal length
        begins = length + source.choice((0, source.randrange(size)))
        own = (len(row.queries), len(row.queries) + length + size - begins)
        row.queries.extend(range(begins, length + size))
        row.causal.append((own, (begins, length + size)))
        if begins > length:
            row.contexts.append((own, (length, begins)))
        length += size

    for _ in range(source.randint(0, 3)):
        prompt = (length, length + source.randint(1, 40))
        add(prompt[1] - prompt[0])
        behind = len(row.queries)
        for size in [source.choice((0, 1, 2, 7, 33)) for _ in range(source.randint(0, 4))]:
            if size:
                add(size)
        if len(row.queries) > behind:
            row.contexts.append(((behind, len(row.queries)), prompt))
    unused = source.randint(0 if length else 1, 3)
    row.queries.extend(range(length, length + unused))
    return row._replace(length=length + unused)


def allowed_by(row: Row) -> Tensor:
    allowed = torch.zeros(len(row.queries), row.length, dtype=torch.bool)
    for (start, end), (first, last) in row.causal:
        allowed[start:end, first:last] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    for (start, end), (first, last) in row.contexts:
        allowed[start:end, first:last] = True
    return allowed


def compared(seed: int, dtype: torch.dtype, sizes: tuple[int, int], scale: float | None) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients, with those of the dense form in float64."""
    source = random.Random(seed)
    row = random_row(source)
    groups, repeats = source.randint(1, 3), source.randint(1, 3)
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, heads: int, size: int) -> Tensor:
        return torch.randn(length, heads, size, generator=generator, dtype=torch.float64).to(dtype)

    size, value_size = sizes
    inputs = [
        draw(len(row.queries), groups * repeats, size),
        draw(row.length, groups, size),
        draw(row.length, groups, value_size),
    ]
    grad = draw(len(row.queries), groups * repeats, value_size)
    ours = [part.clone().requires_grad_() for part in inputs]
    out = segment_attention(*ours, row.causal, row.contexts, scale=scale)
    exact = [part.double().requires_grad_() for part in inputs]
    expected = dense(*exact, allowed_by(row), scale or size**-0.5)
    return [
        (out, expected),
        *zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True),
    ]


@given(
    st.integers(0, 2**32),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([(8, 8), (16, 6), (6, 16)]),
    st.sampled_from([None, 0.3]),
)
def test_output_and_gradients_are_those_of_dense_attention(
    seed: int, dtype: torch.dtype, sizes: tuple[int, int], scale: float | None
) -> None:
    for actual, expected in compared(seed, dtype, sizes, scale):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 100 * UNIT[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize("seed", range(8))
def test_bfloat16_is_near(seed: int) -> None:
    for actual, expected in compared(seed, torch.bfloat16, (8, 8), None):
        assert (actual - expected).abs().max() <= 8 * UNIT[torch.bfloat16] * (1 + expected.abs().max())


def test_places_in_no_span_get_zeros_and_give_none() -> None:
    parts = [torch.randn(5, 2, 4).requires_grad_() for _ in range(3)]
    out = segment_attention(*parts, [], [])
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), parts))
