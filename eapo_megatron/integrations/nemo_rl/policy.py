"""NeMo-RL's policy with workers that return entropies; it keeps those of the responses that it scored last.

Not run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, MCORE_EXECUTABLE
from nemo_rl.models.policy.lm_policy import Policy
from torch import Tensor

WORKER = "eapo_megatron.integrations.nemo_rl.worker.EntropyWorker"


class EntropyPolicy(Policy):
    """Pass it to NeMo-RL's `setup` as `policy_factory`; this package must be importable in the workers' environment."""

    def __init__(self, *, config: Mapping[str, Any], **options: Any) -> None:
        check_policy_config(config)
        ACTOR_ENVIRONMENT_REGISTRY[WORKER] = MCORE_EXECUTABLE
        super().__init__(config=config, worker_extension_cls_fqn=WORKER, **options)
        self.entropies: Tensor | None = None  # float32 [B, S], nats

    def get_logprobs(self, data: Any, timer: Any = None) -> Any:
        result = super().get_logprobs(data, timer=timer)
        self.entropies = result.pop("entropies")
        return result


def check_policy_config(config: Mapping[str, Any]) -> None:
    """ValueError, one sentence naming the key, for a `policy` section whose workers cannot return entropies."""
    megatron = config.get("megatron_cfg") or {}
    if not megatron.get("enabled", False):
        raise ValueError("policy.megatron_cfg.enabled must be true: entropies come from Megatron's sharded logits")
    if megatron.get("context_parallel_size", 1) > 1:
        raise ValueError("policy.megatron_cfg.context_parallel_size must be 1")
    if megatron.get("use_fused_linear_logprobs", False):
        raise ValueError("policy.megatron_cfg.use_fused_linear_logprobs must be false: entropies need the logits")
