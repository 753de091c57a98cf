"""Log-probability and entropy of every token from vocabulary-sharded logits, in one collective.

Each rank reduces its columns, a few tokens at a time, to four numbers a token:

    shift = max_v z_v,   S = sum_v exp(z_v - shift),   U = sum_v exp(z_v - shift) (z_v - shift),   z_target

One all-gather brings the four numbers of every rank together, and log-sum-exp algebra merges them:

    log p_t = z_t - shift - log S          H = log S - U / S

Neither term of H is negative, so nothing cancels. The backward pass computes the probabilities again from shift and S,
straight into the gradient, and needs no collective because every rank holds the merged numbers:

    d log p_t / d z_v = 1[v = t] - p_v          dH / d z_v = -p_v (log p_v + H)

Nothing of the vocabulary's size is kept for it but the logits. All of it runs in bits: logits are scaled by
log2(e) / temperature and exp2 replaces exp. Scale and shift are then one fused multiply-add, and exp2 is the cheaper
function. Results are converted to nats.

The same code serves CPU and GPU tensors; the GPU path is not run here.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eapo_megatron.vocab_parallel.merging import (
    LOG2_OF_ZERO,
    check_target_range,
    gradient_terms,
    log_probs_and_entropy,
    merge_over_ranks,
)

# Elements of one chunk: on CPU a chunk and its scratch stay in the last-level cache; on GPU one chunk fills the device.
_CHUNK_ELEMENTS_CPU = 1 << 19
_CHUNK_ELEMENTS_GPU = 1 << 24
_HUGE_PAGE_BYTES = 1 << 21
# Scratch is two chunks: at least this many chunks keep it a small fraction of the logits whatever the vocabulary.
_MIN_CHUNKS = 64


def vocab_parallel_log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (nats) of softmax(logits / temperature) over the sharded vocabulary.

    H = -sum_v p_v log p_v is the token entropy of EAPO (arXiv 2604.11056). A row without a finite logit on any rank
    gives NaN, as torch.log_softmax does.

    Args:
        logits: [..., V / TP], bfloat16, float16, float32 or float64; never modified. Rank r of tp_group owns the global
            columns [r V / TP, (r + 1) V / TP). -inf is probability zero.
        targets: [...] integer, global token ids, equal on all ranks of tp_group.
        tp_group: the ranks that share the vocabulary; None when logits hold all of it.
        vocab_size: columns from this global index on are padding, outside the softmax and with zero gradient; None
            means no padding.
        temperature: divides the logits.
        entropy_grad: False returns the entropy without gradient and spends nothing on it in backward.
        chunk_size: tokens reduced at a time; None chooses by the memory that a chunk takes.

    Returns:
        log_probs [...] and entropy [...], equal on all ranks; float32 (float64 for float64 logits). chunk_size changes
            no more than the last bits.

    Raises:
        ValueError: for a wrong type, shape, temperature, vocab_size or chunk_size, and for targets outside
            [0, vocab_size). On GPU the range of targets is a device-side assertion, to spare a synchronisation.
    """
    tp_size = 1 if tp_group is None else torch.distributed.get_world_size(tp_group)
    tp_rank = 0 if tp_group is None else torch.distributed.get_rank(tp_group)
    _check_tensors(logits, targets)
    width = logits.shape[-1]
    if vocab_size is None:
        vocab_size = width * tp_size
    if not 0 < vocab_size <= width * tp_size:
        raise ValueError(f"vocab_size must be between 1 and the global width {width * tp_size}, got {vocab_size}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if chunk_size is None:
        budget = _CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        chunk_size = max(1, min(budget // width, targets.numel() // _MIN_CHUNKS))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_target_range(targets, vocab_size)
    columns = min(max(vocab_size - tp_rank * width, 0), width)
    return _LogProbsAndEntropy.apply(
        logits, targets, tp_group, tp_rank * width, columns, temperature, entropy_grad, chunk_size
    )


def _check_tensors(logits: Tensor, targets: Tensor) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        shapes = f"{[*targets.shape]} for logits {[*logits.shape]}"
        raise ValueError(f"targets must have shape logits.shape[:-1], got {shapes}")
    if logits.shape[-1] == 0:
        raise ValueError("logits must have at least one column on every rank")


def _chunks(chunk_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [<= chunk_size, V] over the rows of tensors [..., V] of one shape, in order; any strides, never a copy."""
    if tensors[0].dim() <= 2 or all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1, tensor.shape[-1]).split(chunk_size) for tensor in tensors), strict=True)
    else:
        for parts in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
            yield from _chunks(chunk_size, *parts)


def empty_like(tensor: Tensor) -> Tensor:
    """torch.empty_like; a large CPU buffer asks Linux for huge pages.

    Mapped 4 KiB at a time, the first touch of a vocabulary-sized buffer takes as long as the arithmetic on it.
    """
    buffer = torch.empty_like(tensor)
    size = buffer.numel() * buffer.element_size()
    if sys.platform == "linux" and buffer.device.type == "cpu" and size >= _HUGE_PAGE_BYTES:
        start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (buffer.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return buffer


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tp_group: torch.distributed.ProcessGroup | None,
        first_column: int,
        columns: int,
        temperature: float,
        entropy_grad: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Rounded once, so that the chunks and the merge in float64 scale by the very same number.
        scale = torch.tensor(1 / (temperature * math.log(2)), dtype=dtype).item()
        flat_targets = targets.reshape(-1).long()
        stats = logits.new_zeros(4, flat_targets.numel(), dtype=dtype)
        if columns == 0:
            stats[0] = torch.finfo(dtype).min
        else:
            local = (flat_targets - first_column).clamp_(0, columns - 1)[:, None]
            difference, exponential = logits.new_empty(2, min(chunk_size, len(local)), columns, dtype=dtype)
            start = 0
            for (rows,) in _chunks(chunk_size, logits):
                stop = start + len(rows)
                real = rows[:, :columns]
                shift, sum_exp, sum_exp_z, target = stats[:, start:stop]
                # Scaled in the wide dtype: float16 ends at 65504. A finite shift keeps a row of -inf alone from
                # becoming -inf - -inf.
                shift.copy_(real.amax(-1)).mul_(scale).clamp_(min=torch.finfo(dtype).min)
                d, e = difference[: len(rows)], exponential[: len(rows)]
                torch.add(-shift[:, None], real, alpha=scale, out=d).clamp_(min=LOG2_OF_ZERO)
                torch.sum(torch.exp2(d, out=e), -1, out=sum_exp)
                torch.sum(e.mul_(d), -1, out=sum_exp_z)
                target.copy_(real.gather(1, local[start:stop])[:, 0])
                start = stop
        stats[3].masked_fill_(flat_targets // logits.shape[-1] != first_column // logits.shape[-1], 0)
        whole = merge_over_ranks(stats, tp_group)
        whole[3] *= scale
        results = (whole[0], *log_probs_and_entropy(whole))
        shift, log_sum, log_probs, entropy = (value.to(dtype).view(targets.shape) for value in results)
        ctx.save_for_backward(logits, targets, shift, log_sum, *([entropy] if entropy_grad else []))
        ctx.first_column, ctx.columns, ctx.chunk_size = first_column, columns, chunk_size
        ctx.temperature, ctx.scale = temperature, scale
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, shift, log_sum, *entropy = ctx.saved_tensors
        columns = ctx.columns
        # gradient_v = exp2(d_v) (constant + slope d_v) + 1[v = t] at_target,  d_v = scale z_v - shift
        constant, slope, at_target = gradient_terms(
            grad_log_probs, grad_entropy, log_sum, entropy[0] if entropy else None, ctx.temperature
        )
        constant, slope = constant.view(-1, 1), None if slope is None else slope.view(-1, 1)
        local = targets.reshape(-1, 1).long() - ctx.first_column
        at_target = at_target.reshape(-1, 1).masked_fill((local < 0) | (local >= columns), 0)
        gradient = empty_like(logits)
        if columns < logits.shape[-1]:
            gradient[..., columns:] = 0
        if columns == 0:
            return gradient, *[None] * 7
        local.clamp_(0, columns - 1)
        in_place = gradient.dtype == shift.dtype
        scratch = shift.new_empty(1 if in_place else 2, min(ctx.chunk_size, len(local)), columns)
        shift, start = shift.view(-1, 1), 0
        for rows, gradient_rows in _chunks(ctx.chunk_size, logits, gradient):
            stop = start + len(rows)
            e = scratch[0, : len(rows)]
            d = gradient_rows[:, :columns] if in_place else scratch[1, : len(rows)]
            torch.add(-shift[start:stop], rows[:, :columns], alpha=ctx.scale, out=d).clamp_(min=LOG2_OF_ZERO)
            torch.exp2(d, out=e)
            if slope is None:
                torch.mul(e, constant[start:stop], out=d)
            else:
                d.mul_(slope[start:stop]).add_(constant[start:stop]).mul_(e)
            d.scatter_add_(1, local[start:stop], at_target[start:stop])
            if not in_place:
                gradient_rows[:, :columns] = d
            start = stop
        return gradient, *[None] * 7
