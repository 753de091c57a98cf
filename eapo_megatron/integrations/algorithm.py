"""The algorithm as a host framework's configuration names it, checked before anything is built.

The section has the keys of a recipe's `algorithm` (and KL to a reference policy, where the host has one):

    advantage_estimator: grpo
    shaping: {name: eapo, alpha: 0.2, phi: 2.0}
    loss: {name: clipped_surrogate, eps_low: 0.2, eps_high: 0.28, aggregation: token_mean, kl_coef: 0.0}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import (
    ESTIMATORS,
    LossSettings,
    ShapingInputs,
    group_advantages,
    quadrant_masks,
    quadrant_metrics,
    quadrant_statistics,
    shape_advantages,
)


@dataclass(frozen=True)
class Algorithm:
    """From rewards to shaped advantages, and the loss they enter."""

    advantage_estimator: str = "grpo"
    shaping: str = "eapo"
    shaping_options: Mapping[str, Any] = field(default_factory=dict)
    loss: LossSettings = field(default_factory=LossSettings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, key: str) -> Algorithm:
        """Reads the section found at `key` of the host's configuration; what it leaves out has its default.

        Raises ValueError, one sentence that begins with the wrong key.
        """
        _check_keys(config, ("advantage_estimator", "shaping", "loss"), key)
        estimator = config.get("advantage_estimator", "grpo")
        if estimator not in ESTIMATORS:
            raise ValueError(f"{key}.advantage_estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        options = dict(config.get("shaping", {}))
        shaping = options.pop("name", "eapo")
        algorithm = cls(estimator, shaping, options, loss_settings(config.get("loss", {}), key=f"{key}.loss"))
        one = torch.ones(1, 1)
        try:
            algorithm.advantages(one[0], one[0].long(), one.bool(), log_probs=one, entropies=one)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}.shaping: {error}") from error
        return algorithm

    def advantages(
        self, rewards: Tensor, group_ids: Tensor, mask: Tensor, *, log_probs: Tensor, entropies: Tensor
    ) -> Tensor:
        """Shaped advantages, float32 [N, T], of a batch that holds every response of its groups: no collective.

        rewards: floating point [N], positive for a correct response and negative for a wrong one; group_ids: int64 [N];
        mask: bool [N, T]; log_probs, entropies (nats): float32 [N, T], of the policy that sampled. Values outside the
        mask may be anything.
        """
        advantages = group_advantages(rewards, group_ids, estimator=self.advantage_estimator)
        inputs = ShapingInputs(
            advantages=advantages[:, None] * mask,
            entropies=entropies,
            mask=mask,
            group_ids=group_ids,
            rewards=rewards,
            log_probs=log_probs,
        )
        return shape_advantages(self.shaping, inputs, **self.shaping_options)


def loss_settings(config: Mapping[str, Any], *, key: str) -> LossSettings:
    """The loss's settings from the section found at `key`; ValueError begins with the wrong key."""
    known = {"name": "loss"} | {f.name: f.name for f in fields(LossSettings) if f.name != "loss"}
    _check_keys(config, known, key)
    try:
        return LossSettings(**{known[name]: value for name, value in config.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from error


def batch_metrics(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, *, entropies: Tensor, advantages: Tensor
) -> dict[str, float]:
    """Entropy (nats), |advantage|, and the four quadrants of a batch that holds every response of its groups."""
    tokens = max(int(mask.sum()), 1)
    quadrants = quadrant_masks(rewards, entropies, mask, group_ids)
    return {
        "entropy/mean": float(torch.where(mask, entropies, 0.0).sum(dtype=torch.float64)) / tokens,
        "advantage/mean_abs": float(advantages.abs().sum(dtype=torch.float64)) / tokens,
        **quadrant_metrics(quadrant_statistics(quadrants, entropies, advantages)),
    }


def _check_keys(config: Mapping[str, Any], known: Iterable[str], key: str) -> None:
    for name in config:
        if name not in known:
            raise ValueError(f"{key}.{name}: unknown key, the known ones are {', '.join(known)}")
