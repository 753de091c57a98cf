"""Group-relative advantages: one number a response, from the rewards of all responses to the same prompt.

A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G) is GRPO's (arXiv 2402.03300; EAPO, arXiv 2604.11056, Sec. 2). Choices where
the paper is silent: the standard deviation has Bessel's correction and 1e-6 is added to it, as the common frameworks
do. A new estimator is one function and one line in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_group_ids, check_rewards
from .group_statistics import GroupStatistics, response_statistics

STD_EPSILON = 1e-6
W_REINFORCE_CORRECT = 0.1
W_REINFORCE_INCORRECT = -1.0

# Rewards (float64 [N]) and the statistics of each response's group in, advantages (float64 [N]) out.
Estimator = Callable[[Tensor, GroupStatistics], Tensor]


def grpo(rewards: Tensor, statistics: GroupStatistics) -> Tensor:
    """(r - mean) / (std + 1e-6), Bessel's std (GRPO, arXiv 2402.03300); 0 for a group of one or of equal rewards."""
    return (rewards - statistics.mean) / (statistics.std(correction=1) + STD_EPSILON)


def dr_grpo(rewards: Tensor, statistics: GroupStatistics) -> Tensor:
    """r - mean (Dr.GRPO, arXiv 2503.20783)."""
    return rewards - statistics.mean


def rloo(rewards: Tensor, statistics: GroupStatistics) -> Tensor:
    """r - mean of the group's other rewards (RLOO, arXiv 2402.14740); 0 for a group of one."""
    return (rewards - statistics.mean) * statistics.count / (statistics.count - 1).clamp(min=1)


def w_reinforce(rewards: Tensor, statistics: GroupStatistics) -> Tensor:
    """+0.1 for a correct response (r > 0), -1 for an incorrect one; no normalisation (W-REINF, arXiv 2506.01347)."""
    return torch.where(rewards > 0, W_REINFORCE_CORRECT, W_REINFORCE_INCORRECT).to(rewards)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "w_reinforce": w_reinforce,
}


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantage of each response relative to its group, float32 [N].

    rewards: floating point [N]; group_ids: int64 [N], equal for the responses to one prompt, whichever rank of
    `process_group` holds them. Two collectives, none when `process_group` is None.

    Raises ValueError for an unknown estimator, wrong shapes or dtypes, and non-finite rewards.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    check_rewards(rewards, len(rewards))
    check_group_ids(group_ids, len(rewards))
    statistics = response_statistics(rewards, group_ids, process_group=process_group)
    return ESTIMATORS[estimator](rewards.double(), statistics).float()
