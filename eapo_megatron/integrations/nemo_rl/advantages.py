"""Advantages for NeMo-RL: its estimator's interface, over responses whose entropies the policy's last scoring left.

The driver holds every response of every group, so statistics are exact without a collective; a loss, which sees one
micro-batch, could not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import Algorithm
from eapo_megatron.integrations.nemo_rl.settings import ESTIMATOR_KEYS, check_estimator_config


class EAPOAdvantageEstimator:
    """What `grpo_train` asks as its advantage estimator, from the section `grpo.adv_estimator`:

        name: eapo
        advantage_estimator: grpo
        shaping: {name: eapo, alpha: 0.2, phi: 2.0}
        correct_reward: 1.0
        wrong_reward: 0.0

    Rewards are mapped linearly so that `correct_reward` becomes +1 and `wrong_reward` -1, and rewards between them
    (overlong penalties) stay between. Keys of NeMo-RL's own estimators, which a recipe inherits, are not read; any
    other is refused.

    entropies: returns the entropies, float32 [B, S] in nats, of the responses that were scored last.
    log: is given the metrics of each batch (mean entropy, the four quadrants).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        entropies: Callable[[], Tensor],
        log: Callable[[dict[str, float]], None],
    ) -> None:
        check_estimator_config(config)
        own = {key: config[key] for key in ESTIMATOR_KEYS if key in config}
        self.algorithm = Algorithm.from_config(own, key="grpo.adv_estimator")
        self.correct_reward = float(config.get("correct_reward", 1.0))
        self.wrong_reward = float(config.get("wrong_reward", 0.0))
        if not self.correct_reward > self.wrong_reward:
            raise ValueError(
                f"grpo.adv_estimator.correct_reward {self.correct_reward} must be larger than "
                f"wrong_reward {self.wrong_reward}"
            )
        self._entropies = entropies
        self._log = log

    def compute_advantage(
        self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, *, logprobs_policy: Tensor, **_: Any
    ) -> Tensor:
        """Shaped advantages, float32 [B, S], 0 outside the mask.

        prompt_ids: int64 [B, P], equal rows for the responses to one prompt; rewards: [B]; mask: [B, S], not 0 at
        response tokens; logprobs_policy: float32 [B, S], of the policy that the entropies are of.
        """
        _, group_ids = torch.unique(prompt_ids, dim=0, return_inverse=True)
        response, entropies = mask.bool(), self._entropies()
        if entropies.shape != response.shape:
            raise ValueError(
                f"entropies are {[*entropies.shape]} for responses {[*response.shape]}: scored other ones?"
            )
        span = self.correct_reward - self.wrong_reward
        signed = 2 * (rewards.float() - self.wrong_reward) / span - 1
        advantages = self.algorithm.advantages(
            signed, group_ids, response, log_probs=logprobs_policy.float(), entropies=entropies
        )
        self._log(self.algorithm.metrics(signed, group_ids, response, entropies=entropies, advantages=advantages))
        return advantages
