"""Where high entropy begins: the threshold of the quadrants by name, one number a response, in nats.

    mean    mu_H, the mean entropy of all response tokens of the prompt's group (EAPO, arXiv 2604.11056, Sec. 4.1)
    q25, q50, q75    a quantile of those tokens' entropies, interpolated between neighbours (numpy's "linear")
    kmeans    k-means of those tokens in the plane of polarity and entropy, with two centres for each polarity

A token is of high entropy when its entropy is at least the threshold. The paper's is the mean; the others show whether
what it concludes depends on that. Polarity has two values, and a quadrant has one of them, so in k-means their distance
outweighs any entropy: what is left is to split each polarity's entropies in two such that the sum of squared distances
to the two means is least. In one dimension that is found exactly, without random starts: among the sorted entropies one
split is best. The threshold is halfway between the two means, where the nearer centre changes. Where all entropies are
equal, every token is of high entropy, as with the mean. A new threshold is one function and one line in `THRESHOLDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .group_statistics import gather_rows, token_statistics
from .registry import choose

# Entropies and mask [N, T], group ids (int64 [N]) and which responses are correct (bool [N]) in, a threshold of each
# response (float64 [N]) out; 0 for a group without tokens.
Threshold = Callable[[Tensor, Tensor, Tensor, Tensor, dist.ProcessGroup | None], Tensor]


def mean(
    entropies: Tensor, mask: Tensor, group_ids: Tensor, positive: Tensor, process_group: dist.ProcessGroup | None
) -> Tensor:
    """mu_H."""
    return token_statistics(entropies, mask, group_ids, process_group=process_group).mean


def quantile(
    entropies: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    positive: Tensor,
    process_group: dist.ProcessGroup | None,
    *,
    share: float,
) -> Tensor:
    """The entropy that `share` of the group's tokens lie below."""
    everyone = torch.zeros_like(positive)
    return _by_class(entropies, mask, group_ids, everyone, process_group, partial(_quantile, share=share))


def kmeans(
    entropies: Tensor, mask: Tensor, group_ids: Tensor, positive: Tensor, process_group: dist.ProcessGroup | None
) -> Tensor:
    """The border between the two centres of the group's tokens of the response's polarity."""
    return _by_class(entropies, mask, group_ids, positive, process_group, _border)


THRESHOLDS: dict[str, Threshold] = {
    "mean": mean,
    "q25": partial(quantile, share=0.25),
    "q50": partial(quantile, share=0.5),
    "q75": partial(quantile, share=0.75),
    "kmeans": kmeans,
}


@torch.no_grad()
def entropy_thresholds(
    entropies: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    positive: Tensor,
    *,
    name: str = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The threshold of each response, float64 [N], nats.

    entropies: float32 or float64 [N, T]; mask: bool [N, T]; group_ids: int64 [N]; positive: bool [N], the correct
    responses. Two collectives over `process_group`, none when it is None: of 32 bytes a response for the mean, of 32
    bytes a token for the others.

    Raises:
        ValueError: for an unknown threshold, listing the known ones.
    """
    return choose("threshold", name, THRESHOLDS)(entropies, mask, group_ids, positive, process_group)


def _by_class(
    entropies: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    classes: Tensor,
    process_group: dist.ProcessGroup | None,
    threshold_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """The threshold among all tokens of the response's group and class (bool [N])."""
    keys = torch.stack([group_ids, classes.long()], dim=1)
    own = keys.repeat_interleave(mask.sum(dim=1), dim=0)
    values = entropies[mask].double()
    rows = torch.cat([own, torch.ones_like(own[:, :1]), values[:, None].view(torch.int64)], dim=1)
    rows = gather_rows(rows, process_group).cpu()
    rows = rows[rows[:, 2] == 1]  # padding has 0
    found, place = torch.unique(rows[:, :2], dim=0, return_inverse=True)
    values = rows[:, 3].contiguous().view(torch.float64)
    parts = values[place.argsort(stable=True)].split(torch.bincount(place, minlength=len(found)).tolist())
    thresholds = {
        tuple(key): float(threshold_of(part.sort().values))
        for key, part in zip(found.tolist(), parts, strict=True)
        if len(part)
    }
    of_responses = [thresholds.get(tuple(key), 0.0) for key in keys.tolist()]
    return torch.tensor(of_responses, dtype=torch.float64, device=entropies.device)


def _quantile(values: Tensor, *, share: float) -> Tensor:
    """Of sorted values [M], M > 0."""
    position = share * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (position - below) * (values[above] - values[below])


def _border(values: Tensor) -> Tensor:
    """Halfway between the means of the best two parts of sorted values [M], M > 0; their value where all are equal."""
    if values[0] == values[-1]:
        return values[0]
    # Least squared distances within the parts are most between them: n_1 n_2 (mean_2 - mean_1)^2.
    left = torch.arange(1, len(values), dtype=torch.float64)
    sums = values.cumsum(0)
    low, high = sums[:-1] / left, (sums[-1] - sums[:-1]) / (len(values) - left)
    best = (left * (len(values) - left) * (high - low).square()).argmax()
    return (low[best] + high[best]) / 2
