"""The recipe's keys: what each one means, its type and default, and which values go together.

The text under a field is its description: `eapo-megatron keys` and docs/keys.md print it. `recipe_files` reads recipes.
"""

from eapo_megatron.config.experience import Arithmetic, Data, Overlong, Reward, Rollout
from eapo_megatron.config.methods import METHODS
from eapo_megatron.config.policy import GPUS, Cluster, Head, Model, Optimizer, Parallel
from eapo_megatron.config.recipe import Recipe
from eapo_megatron.config.section import LARGEST, RecipeError, Section
from eapo_megatron.config.training import (
    Algorithm,
    Checkpoint,
    Evaluation,
    Logging,
    Loss,
    Shaping,
    Train,
    WarmStart,
)
from eapo_megatron.config.vllm import VLLM

__all__ = [
    "GPUS",
    "LARGEST",
    "METHODS",
    "VLLM",
    "Algorithm",
    "Arithmetic",
    "Checkpoint",
    "Cluster",
    "Data",
    "Evaluation",
    "Head",
    "Logging",
    "Loss",
    "Model",
    "Optimizer",
    "Overlong",
    "Parallel",
    "Recipe",
    "RecipeError",
    "Reward",
    "Rollout",
    "Section",
    "Shaping",
    "Train",
    "WarmStart",
]
