"""Four numbers that describe a slice of the vocabulary, and what follows from them once all slices are merged.

For logits z_v in bits (scaled by log2(e) / temperature) a slice of the vocabulary leaves of each token

    shift = max_v z_v,   S = sum_v 2^(z_v - shift),   U = sum_v 2^(z_v - shift) (z_v - shift),   z_target or 0

Log-sum-exp algebra merges slices in any order. Over all slices they give

    log2 p_t = z_t - shift - log2 S          H / log 2 = log2 S - U / S

Neither term of H is negative, so nothing cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp2 of this is exactly zero in every float type, and unlike -inf it can be multiplied by zero.
LOG2_OF_ZERO = -1100.0


def merge(slices: Tensor) -> Tensor:
    """The numbers of slices together: [slices, 4, N] -> [4, N] float64."""
    shifts, sums, weighted_sums, targets = slices.double().unbind(1)
    shift = shifts.amax(0)
    offset = (shifts - shift).clamp_(min=LOG2_OF_ZERO)
    weight = offset.exp2()
    weighted_sum = (weight * (weighted_sums + offset * sums)).sum(0)
    return torch.stack([shift, (weight * sums).sum(0), weighted_sum, targets.sum(0)])


def merge_over_ranks(own: Tensor, tp_group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The numbers of all ranks of tp_group together, one all-gather: [4, N] -> [4, N] float64."""
    if tp_group is None:
        return merge(own[None])
    gathered = own.new_empty(torch.distributed.get_world_size(tp_group), *own.shape)
    torch.distributed.all_gather(list(gathered.unbind()), own, group=tp_group)
    return merge(gathered)


def log_probs_and_entropy(whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log2 S, log p of the target, H), nats, each [N] float64, from the numbers of the whole vocabulary [4, N]."""
    shift, total, weighted_sum, target = whole
    log_sum = total.log2()
    return log_sum, (target - shift - log_sum) * math.log(2), (log_sum - weighted_sum / total) * math.log(2)


def gradient_terms(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    log_sum: Tensor,
    entropy: Tensor | None,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(constant, slope, at_target), each shaped as log_sum, of the gradient of a logit before the temperature:

        g_v = 2^d_v (constant + slope d_v) + 1[v = t] at_target,      d_v = z_v - shift,   p_v = 2^d_v / S

    from d log p_t / d z_v = 1[v = t] - p_v and dH / d z_v = -p_v (log p_v + H). Only grad_entropy needs `entropy`.
    """
    at_target = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs / temperature
    inverse = (-log_sum).exp2()
    if grad_entropy is None:
        return -at_target * inverse, None, at_target
    assert entropy is not None
    weight = grad_entropy / temperature
    constant = -at_target - weight * (entropy - log_sum * math.log(2))
    return constant * inverse, weight * -math.log(2) * inverse, at_target


def check_target_range(targets: Tensor, vocab_size: int) -> None:
    """On GPU a device-side assertion, to spare a synchronisation."""
    inside = ((targets >= 0) & (targets < vocab_size)).all()
    message = f"targets must be global token ids in [0, {vocab_size})"
    if targets.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(f"{message}, got {int(targets.min())} to {int(targets.max())}")
