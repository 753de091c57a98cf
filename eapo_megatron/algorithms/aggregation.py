"""How per-token losses add up to one number: each token's share of the loss denominator.

The shares are taken over an optimizer step and all its ranks, so the sum of weight * loss over any split into
micro-batches and ranks is the same global mean. Gradients of ranks are then added, not averaged.
A new aggregation is one function and one line in `AGGREGATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_group_ids, check_mask
from .group_statistics import merge_responses
from .registry import choose

# Tokens of each response (float64 [N]), group ids and the aggregation's length in, the denominator of the response's
# tokens (float64 [N]) out.
Aggregation = Callable[[Tensor, Tensor | None, int, dist.ProcessGroup | None], Tensor]


def token_mean(
    lengths: Tensor, group_ids: Tensor | None, length: int, process_group: dist.ProcessGroup | None
) -> Tensor:
    """The number of response tokens: every token weighs the same (DAPO, arXiv 2503.14476)."""
    return _global_sum(lengths.sum(), process_group).expand_as(lengths)


def group_token_mean(
    lengths: Tensor, group_ids: Tensor | None, length: int, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Tokens of the response's group times the number of groups (EAPO, arXiv 2604.11056, Eq. 2)."""
    if group_ids is None:
        raise ValueError("group_ids are needed for the aggregation 'group_token_mean'")
    unused = torch.zeros_like(lengths)
    groups = merge_responses(lengths, unused, unused, group_ids, process_group=process_group)
    return groups.count * groups.num_groups


def seq_mean_token_mean(
    lengths: Tensor, group_ids: Tensor | None, length: int, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Tokens of the response times the number of responses (GRPO, arXiv 2402.03300)."""
    return lengths * _global_sum((lengths > 0).sum(), process_group)


def seq_mean_token_sum(
    lengths: Tensor, group_ids: Tensor | None, length: int, process_group: dist.ProcessGroup | None
) -> Tensor:
    """`aggregation_length` times the number of responses: a response's tokens add up (Dr.GRPO, arXiv 2503.20783)."""
    return (length * _global_sum((lengths > 0).sum(), process_group)).double().expand_as(lengths)


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "group_token_mean": group_token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
}


def check_length(length: object) -> None:
    """Refuse an aggregation_length that is no whole number from 1 on."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"aggregation_length must be a whole number of 1 or more, got {length!r}")


@torch.no_grad()
def loss_weights(
    mask: Tensor,
    group_ids: Tensor | None,
    *,
    aggregation: str = "token_mean",
    aggregation_length: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weight of each token in the loss, 1 / denominator, float32 [N, T].

    Over all ranks the weights sum to 1, but for "seq_mean_token_sum", the only one that reads `aggregation_length`.
    mask: bool [N, T], the response tokens of the optimizer step on this rank; group_ids: int64 [N], needed by
    "group_token_mean" alone. Responses and groups without tokens do not count; weights outside the mask are 0.
    At most two collectives over `process_group`, none when it is None.

    Raises:
        ValueError: for an unknown aggregation, a length below 1, wrong shapes or dtypes, and missing group_ids.
    """
    denominators_of = choose("aggregation", aggregation, AGGREGATIONS)
    check_length(aggregation_length)
    check_mask(mask)
    if group_ids is not None:
        check_group_ids(group_ids, len(mask))
    lengths = mask.sum(dim=1, dtype=torch.float64)
    denominators = denominators_of(lengths, group_ids, aggregation_length, process_group)
    return torch.where(mask, 1.0 / denominators.clamp(min=1)[:, None], 0.0).float()


def _global_sum(value: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if process_group is not None:
        dist.all_reduce(value, group=process_group)
    return value
