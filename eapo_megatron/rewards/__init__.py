"""Verifiable rewards: a response and its reference answer in, a reward out, with a time limit for each answer."""

from eapo_megatron.rewards.extraction import extract_answer
from eapo_megatron.rewards.mathematics import math_reward
from eapo_megatron.rewards.pool import RewardBatch, RewardPool, check_reward

__all__ = ["RewardBatch", "RewardPool", "check_reward", "extract_answer", "math_reward"]
