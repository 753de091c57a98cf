"""NeMo-RL's policy with workers that return entropies; it keeps those of the responses that it scored last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, MCORE_EXECUTABLE
from nemo_rl.models.policy.lm_policy import Policy
from nemo_rl.utils.venvs import DEFAULT_VENV_DIR
from torch import Tensor

from eapo_megatron.integrations.nemo_rl.settings import check_policy_config

WORKER = "eapo_megatron.integrations.nemo_rl.worker.EntropyWorker"
MEGATRON_WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"


class EntropyPolicy(Policy):
    """Pass it to NeMo-RL's `setup` as `policy_factory`; PYTHONPATH must name the folder of this package.

    Workers run in environments of NeMo-RL's own, which hold what its lock file names; PYTHONPATH reaches them.
    """

    def __init__(self, *, config: Mapping[str, Any], **options: Any) -> None:
        check_policy_config(config)
        ACTOR_ENVIRONMENT_REGISTRY[WORKER] = worker_environment()
        super().__init__(config=config, worker_extension_cls_fqn=WORKER, **options)
        self.entropies: Tensor | None = None  # float32 [B, S], nats

    def get_logprobs(self, data: Any, timer: Any = None) -> Any:
        result = super().get_logprobs(data, timer=timer)
        self.entropies = result.pop("entropies")
        return result


def worker_environment() -> str:
    """The Python of the environment that NeMo-RL's own Megatron workers have, if it is built (containers bring it).

    Else how to build one: NeMo-RL builds one environment for each name of a worker.
    """
    python = Path(os.environ.get("NEMO_RL_VENV_DIR", DEFAULT_VENV_DIR), MEGATRON_WORKER, "bin", "python")
    return str(python) if MCORE_EXECUTABLE.startswith("uv") and python.exists() else MCORE_EXECUTABLE
