"""Statistics of the groups of responses to one prompt, exact however a group is spread over ranks.

Every response is summarised by (count, mean, sum of squared deviations) in float64; the summaries, four numbers a
response, are gathered and merged by group with Chan's formula. Sums of raw squares never appear: they cancel badly and
go negative on long, nearly constant runs. Means are taken in two passes, mean + mean(values - mean), so a constant
run of any length has its exact mean and a deviation of exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of the group that each local response belongs to, over all ranks, in float64.

    A group without values has count, mean and squared deviations 0.
    """

    count: Tensor  # [N] number of values in the response's group
    mean: Tensor  # [N]
    squared_deviations: Tensor  # [N] sum over the group of (value - mean)^2
    num_groups: Tensor  # scalar: groups with at least one value, over all ranks

    def std(self, correction: int) -> Tensor:
        """Standard deviation [N]: correction 0 for the population's, 1 for Bessel's; 0 for a group of one."""
        return (self.squared_deviations / (self.count - correction).clamp(min=1)).sqrt()


def token_statistics(
    values: Tensor, mask: Tensor, group_ids: Tensor, *, process_group: dist.ProcessGroup | None = None
) -> GroupStatistics:
    """Statistics of per-token values [N, T] over all tokens under the mask (bool [N, T]) of each group.

    Two collectives over `process_group`, none when it is None. Ranks may differ in N and T.
    """
    count = mask.sum(dim=1, dtype=torch.float64)
    size = count.clamp(min=1)
    masked = torch.where(mask, values, 0.0).double()
    mean = masked.sum(dim=1) / size
    mean = mean + torch.where(mask, masked - mean[:, None], 0.0).sum(dim=1) / size
    squared_deviations = torch.where(mask, masked - mean[:, None], 0.0).square().sum(dim=1)
    return merge_responses(count, mean, squared_deviations, group_ids, process_group=process_group)


def response_statistics(
    values: Tensor, group_ids: Tensor, *, process_group: dist.ProcessGroup | None = None
) -> GroupStatistics:
    """Statistics of one value a response (rewards [N]) over each group; a response whose value is NaN counts 0.

    Collectives as for `token_statistics`.
    """
    present = ~values.isnan()
    values = torch.where(present, values, 0.0).double()
    return merge_responses(present.double(), values, torch.zeros_like(values), group_ids, process_group=process_group)


def merge_responses(
    count: Tensor,
    mean: Tensor,
    squared_deviations: Tensor,
    group_ids: Tensor,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> GroupStatistics:
    """Merge summaries of responses (float64 [N] each, group_ids int64 [N]) into summaries of their groups.

    Chan's formula for any number of parts: M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2.
    """
    summaries = torch.stack([count, mean, squared_deviations], dim=1)
    rows = torch.cat([group_ids[:, None], summaries.view(torch.int64)], dim=1)
    # Merged on the CPU in the order of ranks: the additions of a GPU's index_add come in any order, and all ranks must
    # obtain the same bits. The table is small, 32 bytes a response.
    rows = gather_rows(rows, process_group).cpu()
    ids, group = torch.unique(rows[:, 0], return_inverse=True)
    counts, means, deviations = rows[:, 1:].contiguous().view(torch.float64).unbind(dim=1)

    def group_sums(parts: Tensor) -> Tensor:
        return parts.new_zeros(len(ids)).index_add(0, group, parts)

    totals = group_sums(counts)
    sizes = totals.clamp(min=1)
    group_means = group_sums(counts * means) / sizes
    group_means = group_means + group_sums(counts * (means - group_means[group])) / sizes
    group_deviations = group_sums(deviations + counts * (means - group_means[group]).square())

    own = torch.searchsorted(ids, group_ids.cpu())
    device = group_ids.device
    return GroupStatistics(
        count=totals[own].to(device),
        mean=group_means[own].to(device),
        squared_deviations=group_deviations[own].to(device),
        num_groups=(totals > 0).sum().to(device),
    )


def gather_rows(rows: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows [N_rank, C] in the order of ranks, padded with rows of count 0, which change no statistic."""
    if process_group is None:
        return rows
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=process_group)
    if longest == 0:
        return rows
    padded = rows.new_zeros(int(longest), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(dist.get_world_size(process_group) * len(padded), rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=process_group)
    return gathered
