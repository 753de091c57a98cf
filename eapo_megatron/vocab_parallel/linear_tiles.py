"""The fused LM head in plain torch: one tile of logits at a time, multiplied, reduced and forgotten.

`forward` and `backward` work on the columns of one rank, z_v = scale (hidden . weight_v + bias_v) in bits, with
scale = log2(e) / temperature. A tile is some tokens by BLOCK columns and stays in the processor's cache: `forward`
leaves four numbers of each token in it (merging.py), `backward` computes it again and turns it into the gradient of
the logits before scaling,

    g_v = 2^d_v (constant + slope d_v) + 1[v = target] at_target,      d_v = z_v - shift

for grad_hidden = g W and grad_weight = g^T hidden: one matrix product forward and three backward.

Everything is computed in float32 (float64 for float64 inputs): 16-bit inputs are widened a tile at a time, so neither
logits nor their gradients are ever rounded to 16 bits.

Tiles are multiplied by whichever library is faster on this processor (`products`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eapo_megatron.vocab_parallel.merging import LOG2_OF_ZERO
from eapo_megatron.vocab_parallel.products import add_product, product

BLOCK = 512  # columns of a vocabulary block
_CHUNK = 512  # tokens of a tile: large enough for matrix products at full speed, small enough for the cache


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local_targets: Tensor,
    scale: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Four numbers for every vocabulary block and token, from which the log-probability and the entropy follow.

    Args:
        hidden: [N, H] floating.
        weight: [C, H] floating: the rank's real columns of the vocabulary.
        bias: [C] floating, or None. -inf is probability zero.
        local_targets: [N] int64, index of the target in weight, -1 where another rank owns it.
        scale: [N] float32, log2(e) / temperature. Its dtype is that of all arithmetic: float64 for float64 inputs.
        chunk_size: tokens of a tile; None chooses.

    Returns:
        [ceil(C / BLOCK), 4, N], dtype of scale: shift, S, U and the target's z, 0 outside the target's block. A block
        of only -inf has shift = finfo.min and S = U = 0.
    """
    precise = scale.dtype
    tokens, chunk = len(hidden), chunk_size or _CHUNK
    blocks = _blocks(len(weight))
    partials = scale.new_empty(len(blocks), 4, tokens)
    scratch = _scratch(scale, min(chunk, tokens))
    for block, columns in enumerate(blocks):
        strip, strip_bias = weight[columns].to(precise), None if bias is None else bias[columns].to(precise)
        target = local_targets - columns.start
        elsewhere = (target < 0) | (target >= len(strip))
        target.masked_fill_(elsewhere, 0)
        for rows in _chunks(tokens, chunk):
            z = _logits(hidden[rows].to(precise), strip, strip_bias, scale[rows])
            e = scratch[: len(z), : len(strip)]
            shift, sum_exp, sum_exp_d, z_target = partials[block, :, rows]
            z_target.copy_(z.gather(1, target[rows, None])[:, 0]).masked_fill_(elsewhere[rows], 0)
            # A finite shift keeps a row of -inf alone from becoming -inf - -inf.
            torch.amax(z, 1, out=shift).clamp_(min=torch.finfo(precise).min)
            d = z.sub_(shift[:, None]).clamp_(min=LOG2_OF_ZERO)
            torch.sum(torch.exp2(d, out=e), 1, out=sum_exp)
            torch.sum(e.mul_(d), 1, out=sum_exp_d)
            del z, d  # before the next tile is made
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
    chunk_size: int | None = None,
) -> Tensor | None:
    """Gradients of hidden, weight and bias from the logits computed again.

    Args:
        hidden, weight, bias, local_targets, scale, chunk_size: as in forward.
        shift, constant, at_target: [N], dtype of scale, terms of g_v above; shift is the largest z_v of the vocabulary.
        slope: [N], dtype of scale; None where the entropy has no gradient.
        keep: [N, ceil(C / BLOCK)] bool, g is zero in the vocabulary blocks that are not kept; None keeps all.
        grad_hidden: whether to compute the gradient of hidden.
        grad_weight: [C, H] floating, to add to, each element rounded once; None leaves it out.
        grad_bias: [C] floating, to add to, each element rounded once; None leaves it out.

    Returns:
        [N, H], dtype of scale: the part of hidden's gradient that comes from these columns; None without grad_hidden.
    """
    precise = scale.dtype
    tokens, chunk = len(hidden), chunk_size or _CHUNK
    of_hidden = torch.zeros_like(hidden, dtype=precise) if grad_hidden else None
    scratch = _scratch(scale, min(chunk, tokens))
    for block, columns in enumerate(_blocks(len(weight))):
        selection = list(_selected_rows(None if keep is None else keep[:, block], tokens, chunk))
        if not selection:
            continue
        strip, strip_bias = weight[columns].to(precise), None if bias is None else bias[columns].to(precise)
        target = local_targets - columns.start
        on_strip = (target >= 0) & (target < len(strip))
        target, at_strip = target.masked_fill(~on_strip, 0)[:, None], at_target.masked_fill(~on_strip, 0)[:, None]
        of_weight = None if grad_weight is None else grad_weight[columns]
        if of_weight is not None and of_weight.dtype != precise:
            of_weight = torch.zeros_like(of_weight, dtype=precise)
        of_bias = None if grad_bias is None else scale.new_zeros(len(strip))
        for rows in selection:
            states = hidden[rows].to(precise)
            z = _logits(states, strip, strip_bias, scale[rows])
            e = scratch[: len(z), : len(strip)]
            d = z.sub_(shift[rows, None]).clamp_(min=LOG2_OF_ZERO)
            torch.exp2(d, out=e)
            if slope is None:
                g = e.mul_(constant[rows, None])
            else:
                g = d.mul_(slope[rows, None]).add_(constant[rows, None]).mul_(e)
            g.scatter_add_(1, target[rows], at_strip[rows])
            if of_hidden is not None:
                if isinstance(rows, slice):
                    add_product(of_hidden[rows], g, strip)
                else:
                    of_hidden.index_add_(0, rows, product(g, strip))
            if of_weight is not None:
                add_product(of_weight, g.T, states)
            if of_bias is not None:
                of_bias += g.sum(0)
            del z, d, g  # before the next tile is made
        if grad_weight is not None and of_weight is not None and of_weight.dtype != grad_weight.dtype:
            grad_weight[columns] += of_weight
        if grad_bias is not None and of_bias is not None:
            grad_bias[columns] += of_bias
    return of_hidden


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _selected_rows(keep: Tensor | None, tokens: int, chunk: int) -> Iterable[slice | Tensor]:
    """The tokens [N] that are kept, a chunk at a time: views where all are."""
    if keep is None or keep.all():
        return _chunks(tokens, chunk)
    kept = keep.nonzero()[:, 0]
    return kept.split(chunk) if len(kept) else ()


def _scratch(scale: Tensor, chunk: int) -> Tensor:
    return scale.new_empty(chunk, BLOCK)


def _logits(states: Tensor, strip: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """A tile of z."""
    z = product(states, strip.T)
    if bias is not None:
        z += bias
    return z.mul_(scale[:, None])
