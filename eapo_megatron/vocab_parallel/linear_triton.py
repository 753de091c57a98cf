"""The fused LM head on NVIDIA GPUs: cuBLAS multiplies, Triton reduces, a strip of the vocabulary at a time.

`forward` and `backward` work on the columns of one rank, z_v = scale (hidden . weight_v + bias_v) in bits, with
scale = log2(e) / temperature. In float32 and a strip at a time, cuBLAS writes hidden . weight into scratch; one kernel
reads it once and leaves either the four numbers of every (token, vocabulary block),

    shift = max_v z_v,   S = sum_v 2^d_v,   U = sum_v 2^d_v d_v,   z_target,      d_v = z_v - shift

or, with the shift of the full vocabulary, the gradient of the unscaled logits

    g_v = 2^d_v (constant + slope d_v) + 1[v = target] at_target

in the dtype of hidden, from which cuBLAS makes g W and g^T hidden. That is one matrix product forward and three
backward, all at the speed of cuBLAS, and beside them 8 bytes of traffic a logit forward (one write, one read) and 10
backward: by an H100's data sheet a third of the time of one product at H = 3584. A kernel that multiplies and reduces
at once would save that traffic and give up the speed of cuBLAS. Scratch is bounded whatever the shape: 128 MiB of
logits and, in backward, 256 MiB of 16-bit gradient for up to 131,072 tokens. Nothing is atomic: equal inputs give
equal bits.

Precision: 16-bit inputs are multiplied exactly and summed in float32, and only g is rounded to 16 bits, as the
gradient of 16-bit logits would be. In float16 all of g is multiplied by one power of two first, so that small
probabilities do not underflow. float32 inputs follow torch.backends.cuda.matmul (IEEE unless TF32 was allowed).

Needs Triton 3.6 and torch 2.10 or newer. The kernels ran in Triton's interpreter and were compiled for NVIDIA GPUs of
compute capability 8.0, 9.0 and 10.0; they were not run on a GPU here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a vocabulary block
TOKEN_BLOCK = 1  # tokens of a tile of `keep`: rows are gathered one by one
# Sizes of scratch in elements and of strips in columns, argued and not tuned on a GPU: a product of these sizes fills
# the device several times, and wide strips seldom read and write the gradient of hidden that they add to. Where tiles
# are filtered, fewer tokens visit a narrow strip.
_LOGITS = 1 << 25
_GRADIENT = 1 << 27
_STRIP = 16 * BLOCK
_FILTERED_STRIP = 2 * BLOCK
_ROWS = 4  # tokens of one program
_FLOAT32_MIN = tl.constexpr(torch.finfo(torch.float32).min)
# exp2 of this is exactly zero, and unlike -inf it can be multiplied by zero.
_LOG2_OF_ZERO = tl.constexpr(-1100.0)


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, local_targets: Tensor, scale: Tensor) -> Tensor:
    """Four numbers for every vocabulary block and token, from which the log-probability and the entropy follow.

    Args:
        hidden: [N, H] bfloat16, float16 or float32.
        weight: [C, H], dtype of hidden: the rank's real columns of the vocabulary.
        bias: [C] of any floating dtype, or None. -inf is probability zero.
        local_targets: [N] int64, index of the target in weight, -1 where another rank owns it.
        scale: [N] float32, log2(e) / temperature.

    Returns:
        [ceil(C / BLOCK), 4, N] float32: shift, S, U and the target's scaled logit, 0 outside the target's block. A
        block of only -inf has shift = finfo.min and S = U = 0.
    """
    tokens, columns = len(hidden), len(weight)
    partials = hidden.new_empty(triton.cdiv(columns, BLOCK), 4, tokens, dtype=torch.float32)
    local_targets, scale = local_targets.contiguous(), scale.contiguous()
    chunk = _LOGITS // _STRIP
    scratch = hidden.new_empty(min(tokens, chunk), _STRIP, dtype=torch.float32)
    for start in range(0, columns, _STRIP):
        strip = weight[start : start + _STRIP]
        blocks = partials[start // BLOCK :]
        for first in range(0, tokens, chunk):
            rows = slice(first, first + chunk)
            logits = _logits(hidden[rows], strip, scratch)
            _reduce[_grid(logits)](
                logits,
                None if bias is None else bias[start:],
                local_targets[rows],
                scale[rows],
                blocks[:, :, rows],
                *logits.shape,
                start,
                logits.stride(0),
                tokens,
                ROWS=_ROWS,
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )
    return partials


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local_targets: Tensor,
    scale: Tensor,
    shift: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    at_target: Tensor,
    *,
    keep: Tensor | None,
    grad_hidden: bool,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Tensor | None:
    """Gradients of hidden, weight and bias from the logits computed again.

    Filtering costs two synchronisations with the GPU, float16 one; otherwise there is none.

    Args:
        hidden, weight, bias, local_targets, scale: as in forward.
        shift, constant, at_target: [N] float32, terms of g_v above; shift is the largest z_v of the full vocabulary.
        slope: [N] float32, None where the entropy has no gradient.
        keep: [N, ceil(C / BLOCK)] bool, g is zero in the vocabulary blocks that are not kept; None keeps all.
        grad_hidden: whether to compute the gradient of hidden.
        grad_weight: [C, H] float32 or dtype of weight, to add to; None leaves it out.
        grad_bias: [C] floating, to add to; None leaves it out.

    Returns:
        [N, H] float32, the part of the gradient of hidden that comes from these columns; None without grad_hidden.
    """
    tokens, columns = len(hidden), len(weight)
    result = hidden.new_zeros(hidden.shape, dtype=torch.float32) if grad_hidden else None
    if tokens == 0 or columns == 0 or (result is None and grad_weight is None and grad_bias is None):
        return result
    widest = _STRIP if keep is None else _FILTERED_STRIP
    width = min(widest, max(_GRADIENT // tokens // BLOCK, 1) * BLOCK)
    starts = range(0, columns, width)
    selections: Sequence[Tensor]
    if keep is None:
        selections = [torch.arange(tokens, device=hidden.device)] * len(starts)
    else:
        keep = keep.contiguous()
        selections = _tokens_of_strips(keep, width // BLOCK)
    unit = _float16_unit(constant, slope, at_target) if hidden.dtype == torch.float16 else 1.0
    vectors = [
        vector if vector is None else vector.contiguous()
        for vector in (local_targets, scale, shift, constant, slope, at_target)
    ]
    chunk = _LOGITS // width
    logits_scratch = hidden.new_empty(min(tokens, chunk), width, dtype=torch.float32)
    gradient_scratch = hidden.new_empty(tokens, width)
    for start, selection in zip(starts, selections, strict=True):
        strip = weight[start : start + width]
        if len(selection) == 0:
            continue
        everywhere = len(selection) == tokens
        rows = hidden if everywhere else hidden[selection]
        gradient = gradient_scratch[: len(rows), : len(strip)]
        for first in range(0, len(rows), chunk):
            logits = _logits(rows[first : first + chunk], strip, logits_scratch)
            _differentiate[_grid(logits)](
                logits,
                None if bias is None else bias[start:],
                selection[first:],
                *vectors,
                None if keep is None else keep[:, start // BLOCK :],
                gradient[first:],
                unit,
                *logits.shape,
                start,
                logits.stride(0),
                gradient.stride(0),
                0 if keep is None else keep.stride(0),
                ROWS=_ROWS,
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )
        if result is not None and everywhere:
            _add_product(result, gradient, strip, 1 / unit)
        elif result is not None:
            product = _add_product(result.new_zeros(rows.shape), gradient, strip, 1 / unit)
            result.index_add_(0, selection, product)
        if grad_weight is not None:
            _add_product(grad_weight[start : start + width], gradient.T, rows, 1 / unit)
        if grad_bias is not None:
            grad_bias[start : start + width] += gradient.sum(0, dtype=torch.float32) / unit
    return result


def _grid(logits: Tensor) -> tuple[int, int]:
    return triton.cdiv(len(logits), _ROWS), triton.cdiv(logits.shape[1], BLOCK)


def _logits(hidden: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    """hidden weight^T in a corner of scratch, float32 whatever the inputs are."""
    logits = scratch[: len(hidden), : len(weight)]
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=logits)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """total += factor left right, rounded to the dtype of total, the inputs' or float32."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=factor)
    return torch.addmm(total, left, right, out_dtype=torch.float32, alpha=factor, out=total)


def _tokens_of_strips(keep: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """For every strip of so many vocabulary blocks the indices of the tokens that keep one of its tiles."""
    visited = torch.stack([strip.any(1) for strip in keep.split(blocks, 1)])
    return visited.nonzero()[:, 1].split(visited.sum(1).tolist())


def _float16_unit(constant: Tensor, slope: Tensor | None, at_target: Tensor) -> float:
    """The power of two that brings the largest possible |g| just under float16's largest number.

    2^d and 2^d |d| are at most 1 for d <= 0, so |g| <= |constant| + |slope| + |at_target|.
    """
    bound = constant.abs() + at_target.abs()
    if slope is not None:
        bound += slope.abs()
    return 2.0 ** min(15 - math.frexp(bound.max().item())[1], 100)


@triton.jit
def _bits(logits, bias, scale, row, column, rows, columns, row_stride):
    """The tile's z, [ROWS, BLOCK] float32; -inf outside the matrix."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    z = tl.load(logits + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=inside, other=float("-inf"))
    if bias is not None:
        z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return z * scale[:, None]


@triton.jit
def _finite(d):
    """d without -inf; NaN stays, which tl.maximum would drop."""
    return tl.where(d < _LOG2_OF_ZERO, _LOG2_OF_ZERO, d)


@triton.jit
def _reduce(
    logits,
    bias,
    targets,
    scales,
    partials,
    rows,
    columns,
    first_column,
    row_stride,
    partial_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    target = tl.load(targets + row, mask=row < rows, other=-1) - first_column
    z = _bits(logits, bias, scale, row, column, rows, columns, row_stride)
    largest = tl.max(z, 1)
    shift = tl.where(largest > _FLOAT32_MIN, largest, _FLOAT32_MIN)
    d = _finite(z - shift[:, None])
    e = tl.exp2(d)
    of_block = partials + tl.program_id(1).to(tl.int64) * 4 * partial_stride + row
    tl.store(of_block, shift, mask=row < rows)
    tl.store(of_block + partial_stride, tl.sum(e, 1), mask=row < rows)
    tl.store(of_block + 2 * partial_stride, tl.sum(e * d, 1), mask=row < rows)
    z_target = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
    tl.store(of_block + 3 * partial_stride, z_target, mask=row < rows)


@triton.jit
def _differentiate(
    logits,
    bias,
    selection,
    targets,
    scales,
    shifts,
    constants,
    slopes,
    at_targets,
    keep,
    gradient,
    unit,
    rows,
    columns,
    first_column,
    row_stride,
    gradient_stride,
    keep_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(selection + row, mask=row < rows, other=0)
    scale = tl.load(scales + token)
    shift = tl.load(shifts + token)
    constant = tl.load(constants + token)
    target = tl.load(targets + token) - first_column
    z = _bits(logits, bias, scale, row, column, rows, columns, row_stride)
    d = _finite(z - shift[:, None])
    if slopes is None:
        g = tl.exp2(d) * constant[:, None]
    else:
        g = tl.exp2(d) * (constant[:, None] + tl.load(slopes + token)[:, None] * d)
    g += tl.where(column[None, :] == target[:, None], tl.load(at_targets + token)[:, None], 0.0)
    if keep is not None:
        kept = tl.load(keep + token * keep_stride + tl.program_id(1)).to(tl.int1)
        g = tl.where(kept[:, None], g, 0.0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    destination = gradient + row.to(tl.int64)[:, None] * gradient_stride + column[None, :]
    tl.store(destination, (g * unit).to(gradient.dtype.element_ty), mask=inside)
