"""The tokens with the largest values of a batch that is spread over ranks, selected exactly.

Radix selection: float32 values map to 32-bit keys of the same order, and the threshold's key is found 16 bits at a time
from histograms summed over ranks. Two all-reduces of 65,536 counts, whatever the number of tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

DIGIT = 1 << 16


@torch.no_grad()
def top_tokens(
    values: Tensor,
    mask: Tensor,
    *,
    fraction: float = 1.0,
    count: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Boolean mask [N, T] of the top `fraction` of the tokens under `mask`, over all ranks of `process_group`.

    values: float32 [N, T] (float64 is rounded to float32); mask: bool [N, T]. The fraction of the number of tokens is
    rounded to the nearest whole number, at least one; `count`, 1 or more, gives that number instead (more than there
    are: all). Tokens equal to the smallest selected value are selected too.
    """
    keys = _ordered_keys(values)
    leading, trailing = keys // DIGIT, keys % DIGIT
    histogram = _histogram(leading[mask], process_group)
    position = max(1, round(fraction * int(histogram.sum()))) if count is None else count
    threshold_leading, position = _locate(histogram, position)
    histogram = _histogram(trailing[mask & (leading == threshold_leading)], process_group)
    threshold_trailing, _ = _locate(histogram, position)
    return mask & (keys >= threshold_leading * DIGIT + threshold_trailing)


def _ordered_keys(values: Tensor) -> Tensor:
    """Integers in [0, 2^32) in the order of the float32 values: a negative float has all its bits inverted."""
    bits = (values.float() + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _histogram(digits: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    counts = torch.bincount(digits, minlength=DIGIT)
    if process_group is not None:
        dist.all_reduce(counts, group=process_group)
    return counts


def _locate(histogram: Tensor, position: int) -> tuple[int, int]:
    """The digit of the entry at `position` from the largest (1), and its position among the entries of that digit."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    digit = int((at_least >= position).sum()) - 1
    return digit, position - int(at_least[digit] - histogram[digit])
