"""Attention over ragged pieces of a packed row, by either backend, against dense masked attention in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from eapo_megatron.policy.context_parallel import Context
from eapo_megatron.policy.flex_attention import block_mask, flex_segment_attention
from eapo_megatron.policy.segment_attention import Span, _flash, _flash_backward, segment_attention
from eapo_megatron.policy.segments import Part, Segments, cut_of, segments_of

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


def by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: Sequence[tuple[Span, Span]],
    contexts: Sequence[tuple[Span, Span]],
    *,
    scale: float | None,
) -> Tensor:
    """FlexAttention with the arguments of `segment_attention`."""
    mask = block_mask(causal, contexts, len(query), len(key), query.device)
    return flex_segment_attention(query, key, value, mask, scale=scale)


@pytest.fixture
def _flex_trains_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check alone keeps torch's FlexAttention from it; its formula for the CPU has a backward."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def compared(
    seed: int,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    scale: float | None,
    attend: Callable[..., Tensor] = segment_attention,
) -> list[tuple[Tensor, Tensor]]:
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
    out = attend(*ours, row.causal, row.contexts, scale=scale)
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


@pytest.mark.usefixtures("_flex_trains_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "scale"), [((8, 8), None), ((16, 6), 0.3), ((6, 16), None)])
def test_flex_is_dense_attention_too(dtype: torch.dtype, sizes: tuple[int, int], scale: float | None) -> None:
    for actual, expected in compared(0, dtype, sizes, scale, by_flex):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 100 * UNIT[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize("seed", range(8))
def test_flex_sees_what_the_spans_say(seed: int) -> None:
    row = random_row(random.Random(seed))
    mask = block_mask(row.causal, row.contexts, len(row.queries), row.length, torch.device("cpu"))
    seen = create_mask(mask.mask_mod, 1, 1, len(row.queries), row.length, device="cpu")
    assert torch.equal(seen[0, 0], allowed_by(row))


def packed_row(rank: int, ranks: int, prompt: int = 300) -> Segments:
    """A rank's places of a row whose prompt and responses are of several blocks."""
    parts = [Part((0, 1, 2), prompt, (400, 1, 150)), Part((3,), 290, (310,))]
    context = Context(rank, ranks)
    cut = cut_of(parts, context)
    return segments_of(parts, cut, cut.most + 3, torch.device("cpu"), context)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_blocks_are_those_that_torch_counts(rank: int, ranks: int) -> None:
    mask = packed_row(rank, ranks).block_mask
    counted = create_block_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(mask, name), getattr(counted, name)), name
    assert mask.full_kv_num_blocks.any()
    assert mask.kv_num_blocks.any()


@pytest.mark.usefixtures("_flex_trains_on_cpu")
def test_flex_is_compiled_once_for_packs_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr("eapo_megatron.policy.flex_attention.flex_attention", compiled)
    for prompt in (300, 170, 555):
        segments = packed_row(0, 1, prompt)
        query = torch.randn(len(segments.positions), 4, 16, requires_grad=True)
        key, value = (torch.randn(len(segments.positions), 2, 16, requires_grad=True) for _ in range(2))
        outs = [segments.attend(query, key, value, scale=None, backend=backend) for backend in ("torch", "flex")]
        grads = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in outs]
        for of_torch, of_flex in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(of_flex, of_torch)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_a_row_without_tokens_gives_zeros(backend: Literal["torch", "flex"]) -> None:
    segments = segments_of([], cut_of([], Context()), 1, torch.device("cpu"))
    segments.order = torch.zeros(0, dtype=torch.int64)  # as under context parallelism: no keys
    query = torch.randn(1, 2, 4)
    out = segments.attend(query, query, query, scale=None, backend=backend)
    assert not out.any()


def test_the_kernel_of_gpus_takes_the_arguments() -> None:
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(1, 4, 30, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(1, 2, 50, 64, device="cuda", dtype=torch.bfloat16)
        out, lse = _flash(query, key, key, False, 0.1)
        assert out.shape == query.shape
        assert (lse.shape, lse.dtype) == (query.shape[:-1], torch.float32)
        grads = _flash_backward(out, query, key, key, out, lse, False, 0.1)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
