"""The recipe for NeMo-RL through its own configuration classes."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_rl.algorithms.grpo import MasterConfig
from nemo_rl.utils.config import parse_hydra_overrides, register_omegaconf_resolvers
from omegaconf import OmegaConf

RECIPES = Path(__file__).parents[2] / "recipes" / "nemo_rl"
sys.path.insert(0, str(RECIPES))
import run_grpo_eapo  # noqa: E402

RECIPE = RECIPES / "grpo-qwen2.5-math-7b-1n8g-megatron-eapo.yaml"
# Of the tiny model, on which the recipe runs here.
TINY = (
    "policy.precision=float32",
    "policy.max_total_sequence_length=32",
    "policy.megatron_cfg.optimizer.optimizer=sgd",
    "policy.megatron_cfg.optimizer.sgd_momentum=0",
    "policy.megatron_cfg.optimizer.weight_decay=0",
    "policy.megatron_cfg.optimizer.lr=0.5",
    "policy.megatron_cfg.optimizer.min_lr=0.5",
    "policy.megatron_cfg.optimizer.clip_grad=0",
    "policy.megatron_cfg.tensor_model_parallel_size=1",
)


def real_config(model: Path, *overrides: str) -> MasterConfig:
    """The recipe over NeMo-RL's base configuration, for the tiny model in that folder."""
    register_omegaconf_resolvers()
    config = parse_hydra_overrides(run_grpo_eapo.load(str(RECIPE)), [*TINY, f"policy.model_name={model}", *overrides])
    return MasterConfig(**OmegaConf.to_container(config, resolve=True))
