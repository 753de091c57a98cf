"""Four Quadrant Decomposition of response tokens by reward polarity and entropy (EAPO, arXiv 2604.11056, Sec. 4.1).

phr: correct and H >= mu_H    plr: correct and H < mu_H    nhr: incorrect and H >= mu_H    nlr: incorrect and H < mu_H
mu_H is the mean entropy (nats) of all response tokens of the prompt's group, or another threshold by name
(`thresholds`). A response is correct when its reward exceeds `positive_threshold`; 0, the default, is midway between +1
and -1 and also separates 1 from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_finite, check_group_ids, check_mask, check_rewards, check_tokens, check_verdicts
from .thresholds import entropy_thresholds

QUADRANTS = ("phr", "plr", "nhr", "nlr")


@torch.no_grad()
def quadrant_masks(
    rewards: Tensor,
    entropies: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    threshold: str = "mean",
    positive_threshold: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The quadrants "phr", "plr", "nhr", "nlr" as boolean masks [N, T] that partition `mask` (EAPO Sec. 4.1).

    rewards: floating point [N]; entropies: float32 or float64 [N, T] in nats; mask: bool [N, T]; group_ids: int64 [N];
    threshold: mean (the paper's mu_H), q25, q50, q75 or kmeans, each of a prompt's group and exact over the ranks of
    `process_group`: two collectives, none when it is None.

    Raises:
        ValueError: for an unknown threshold, wrong shapes or dtypes, for values that are not finite under the mask, and
            for a response without a verdict (a reward of NaN) that has tokens under the mask.
    """
    check_mask(mask)
    check_rewards(rewards, len(mask))
    check_verdicts(rewards, mask)
    check_group_ids(group_ids, len(mask))
    check_tokens("entropies", entropies, mask)
    check_finite("entropies", entropies, mask)
    positive = rewards > positive_threshold
    thresholds = entropy_thresholds(entropies, mask, group_ids, positive, name=threshold, process_group=process_group)
    return split_quadrants(rewards, entropies, mask, thresholds, positive_threshold=positive_threshold)


def split_quadrants(
    rewards: Tensor, entropies: Tensor, mask: Tensor, thresholds: Tensor, *, positive_threshold: float
) -> dict[str, Tensor]:
    """The quadrant masks, given each response's threshold of entropy (float64 [N])."""
    high = entropies >= thresholds[:, None]
    positive = (rewards > positive_threshold)[:, None]
    return {
        "phr": mask & positive & high,
        "plr": mask & positive & ~high,
        "nhr": mask & ~positive & high,
        "nlr": mask & ~positive & ~high,
    }


def check_quadrant_names(name: str, quadrants: Iterable[str]) -> None:
    """Refuse names that are not quadrants."""
    for quadrant in quadrants:
        if quadrant not in QUADRANTS:
            raise ValueError(f"{name} must hold names among {', '.join(QUADRANTS)}, got {quadrant!r}")


@torch.no_grad()
def quadrant_statistics(quadrants: Mapping[str, Tensor], entropies: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Sums over each quadrant's tokens, additive over micro-batches and ranks: float64 scalars.

    quadrants: from `quadrant_masks`, bool [N, T] each; entropies (nats), advantages: float32 or float64 [N, T].
    Keys, for each quadrant: "quadrants/phr/tokens", "quadrants/phr/entropy_sum", "quadrants/phr/abs_advantage_sum".

    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    sums = {}
    for name, mask in quadrants.items():
        check_mask(mask)
        check_tokens("entropies", entropies, mask)
        check_tokens("advantages", advantages, mask)
        sums[f"quadrants/{name}/tokens"] = mask.sum(dtype=torch.float64)
        sums[f"quadrants/{name}/entropy_sum"] = torch.where(mask, entropies, 0.0).sum(dtype=torch.float64)
        sums[f"quadrants/{name}/abs_advantage_sum"] = torch.where(mask, advantages.abs(), 0.0).sum(dtype=torch.float64)
    return sums


def quadrant_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of each quadrant from the sums of `quadrant_statistics`, themselves summed over micro-batches and ranks.

    "quadrants/phr/token_share" of all response tokens, "quadrants/phr/mean_entropy" (nats) and
    "quadrants/phr/mean_abs_advantage". An empty quadrant has no means: its share, 0, stands alone. Without any token
    there are no metrics.
    """
    tokens = {name: float(sums[f"quadrants/{name}/tokens"]) for name in QUADRANTS}
    total = sum(tokens.values())
    metrics = {}
    for name, count in tokens.items():
        if total > 0:
            metrics[f"quadrants/{name}/token_share"] = count / total
        if count > 0:
            metrics[f"quadrants/{name}/mean_entropy"] = float(sums[f"quadrants/{name}/entropy_sum"]) / count
            metrics[f"quadrants/{name}/mean_abs_advantage"] = float(sums[f"quadrants/{name}/abs_advantage_sum"]) / count
    return metrics
