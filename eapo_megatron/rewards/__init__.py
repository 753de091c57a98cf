"""Verifiable rewards: a response and its reference answer in, a reward out, with a time limit for each answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eapo_megatron.rewards.extraction import extract_answer
    from eapo_megatron.rewards.mathematics import math_reward
    from eapo_megatron.rewards.pool import RewardBatch, RewardPool, check_reward

__all__ = ["RewardBatch", "RewardPool", "check_reward", "extract_answer", "math_reward"]

_MODULES = {"extract_answer": "extraction", "math_reward": "mathematics"}  # of the others: pool


def __getattr__(name: str) -> Any:
    """Imports a name with its first use: the workers of a user's reward function never load sympy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'pool')}"), name)
