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
from .registry import choose

STD_EPSILON = 1e-6
W_REINFORCE_CORRECT = 0.1
W_REINFORCE_INCORRECT = -1.0

# Rewards (float64 [N]), the statistics of each response's group and the reward above which a response is correct in,
# advantages (float64 [N]) out.
Estimator = Callable[[Tensor, GroupStatistics, float], Tensor]


def grpo(rewards: Tensor, statistics: GroupStatistics, positive_threshold: float) -> Tensor:
    """(r - mean) / (std + 1e-6), Bessel's std (GRPO, arXiv 2402.03300); 0 for a group of one or of equal rewards."""
    return (rewards - statistics.mean) / (statistics.std(correction=1) + STD_EPSILON)


def dr_grpo(rewards: Tensor, statistics: GroupStatistics, positive_threshold: float) -> Tensor:
    """r - mean (Dr.GRPO, arXiv 2503.20783)."""
    return rewards - statistics.mean


def rloo(rewards: Tensor, statistics: GroupStatistics, positive_threshold: float) -> Tensor:
    """r - mean of the group's other rewards (RLOO, arXiv 2402.14740); 0 for a group of one."""
    return (rewards - statistics.mean) * statistics.count / (statistics.count - 1).clamp(min=1)


def w_reinforce(rewards: Tensor, statistics: GroupStatistics, positive_threshold: float) -> Tensor:
    """+0.1 for a correct response, -1 for an incorrect one; no normalisation (W-REINF, arXiv 2506.01347)."""
    return torch.where(rewards > positive_threshold, W_REINFORCE_CORRECT, W_REINFORCE_INCORRECT).to(rewards)


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
    positive_threshold: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantage of each response relative to its group, float32 [N].

    rewards: floating point [N], NaN for a response without a verdict: its advantage is 0, and its group's mean,
    standard deviation and size are those of the other responses. group_ids: int64 [N], equal for the responses to one
    prompt, whichever rank of `process_group` holds them. A response is correct when its reward exceeds
    `positive_threshold`. Two collectives, none when `process_group` is None.

    Raises:
        ValueError: for an unknown estimator, wrong shapes or dtypes, and infinite rewards.
    """
    estimate = choose("estimator", estimator, ESTIMATORS)
    check_rewards(rewards, len(rewards))
    check_group_ids(group_ids, len(rewards))
    statistics = response_statistics(rewards, group_ids, process_group=process_group)
    judged = ~rewards.isnan()
    advantages = estimate(torch.where(judged, rewards, 0.0).double(), statistics, positive_threshold)
    return torch.where(judged, advantages, 0.0).float()


def min_group_size(estimator: str) -> int:
    """The smallest group with an advantage other than 0: 2 where a response is compared with the others of its group.

    Raises:
        ValueError: for an unknown estimator.
    """
    alone = group_advantages(torch.ones(1), torch.zeros(1, dtype=torch.int64), estimator=estimator)
    return 1 if bool(alone.any()) else 2
